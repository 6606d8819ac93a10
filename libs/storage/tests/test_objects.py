import asyncio
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.contracts.errors import InvalidError
from tessera.storage import ObjectNotFoundError, ObjectStat, ObjectStore, ObjectStoreSettings, StorageUnavailableError

pytestmark = pytest.mark.unit


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    url = (tmp_path / "objects").as_uri() if request.param == "folder" else f"memory://{tmp_path.name}"
    return ObjectStore(ObjectStoreSettings(url=url))


async def test_what_was_put_is_got(store: ObjectStore) -> None:
    assert await store.put("reports/2026/a.json", b"content") == 7
    assert await store.get("reports/2026/a.json") == b"content"
    assert await store.stat("reports/2026/a.json") == ObjectStat("reports/2026/a.json", 7)


async def test_a_file_is_stored_from_where_it_stands(store: ObjectStore) -> None:
    source = BytesIO(b"header,content")
    source.seek(7)
    assert await store.put("part", source) == 7
    assert await store.get("part") == b"content"


async def test_putting_again_replaces(store: ObjectStore) -> None:
    await store.put("key", b"first and longer")
    await store.put("key", b"second")
    assert await store.get("key") == b"second"


async def test_open_gives_a_seekable_file(store: ObjectStore) -> None:
    await store.put("table.csv", b"0123456789")
    async with store.open("table.csv") as file:

        def tail() -> bytes:
            file.seek(7)
            return file.read()

        assert await asyncio.to_thread(tail) == b"789"


async def test_a_missing_object_is_named(store: ObjectStore) -> None:
    await store.check()
    with pytest.raises(ObjectNotFoundError, match="nothing/here") as raised:
        await store.get("nothing/here")
    assert raised.value.code == "object_not_found"
    with pytest.raises(ObjectNotFoundError):
        await store.stat("nothing/here")
    with pytest.raises(ObjectNotFoundError):
        async with store.open("nothing/here"):
            pass


async def test_deleting_twice_is_fine(store: ObjectStore) -> None:
    await store.put("key", b"x")
    await store.delete("key")
    await store.delete("key")
    with pytest.raises(ObjectNotFoundError):
        await store.get("key")


async def test_keys_are_listed_by_folder(store: ObjectStore) -> None:
    for key in ("a/2", "a/1", "b/1"):
        await store.put(key, b"")
    assert await store.keys("a") == ["a/1", "a/2"]
    assert await store.keys("c") == []


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../up", "a/../b", "a/..", "./a", "a//b", "a/", "a\\b", "a\x00", "é", "~/x", "a b", "x" * 513]
)
async def test_a_key_that_could_leave_the_store_is_refused(store: ObjectStore, key: str) -> None:
    with pytest.raises(InvalidError) as raised:
        await store.put(key, b"x")
    assert raised.value.code == "invalid_object_key"


@given(key=st.text(alphabet="ab./\\~-_% \x00", max_size=12))
def test_no_accepted_key_points_outside(key: str) -> None:
    store = ObjectStore(ObjectStoreSettings(url="file:///srv/objects"))
    try:
        path = Path(store._path(key))
    except InvalidError:
        return
    assert path.resolve().is_relative_to(Path("/srv/objects"))
    assert str(path) == f"/srv/objects/{key}"


class Broken(BytesIO):
    """Fails after the first piece."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell():
            raise OSError("the upload broke off")
        return super().read(1)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def test_a_broken_write_leaves_the_old_object_and_no_rest(tmp_path: Path) -> None:
    store = ObjectStore(ObjectStoreSettings(url=tmp_path.as_uri()))
    await store.put("key", b"old")
    with pytest.raises(StorageUnavailableError):
        await store.put("key", Broken(b"new content"))
    assert await store.get("key") == b"old"
    assert await asyncio.to_thread(names, tmp_path) == ["key"]


async def test_a_store_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = ObjectStore(ObjectStoreSettings(url=(tmp_path / "file" / "objects").as_uri()))
    with pytest.raises(StorageUnavailableError):
        await store.put("key", b"x")
    with pytest.raises(StorageUnavailableError):
        await store.check()
