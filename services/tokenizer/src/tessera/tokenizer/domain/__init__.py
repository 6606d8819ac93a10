"""Pure rules: what a composition is, and how a prompt is counted."""
