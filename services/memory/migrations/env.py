from tessera.storage.migrations import run

run("memory")
