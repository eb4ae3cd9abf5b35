"""The commands of `tutelage` that do not train: is this run worth it, will it start, what happens to a text."""
