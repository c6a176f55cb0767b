"""Small interleaved data for tests: records of the shapes world, a tokenizer of their words."""

from starflow2_jax.data import records, shapes_tasks, tokenizer


def make(folder, count=48, pixels=16, tasks=shapes_tasks.TASKS, patch=8, merge=1, size=400):
    """(dataset folder, tokenizer folder), both made under `folder`."""
    data, held = folder / "data", folder / "tokenizer"
    records.write(data, shapes_tasks.make_records(3, count, pixels, tasks=list(tasks)))
    tokenizer.write(tokenizer.train(data, size), held, patch=patch, merge=merge, frames=2)
    return str(data), str(held)
