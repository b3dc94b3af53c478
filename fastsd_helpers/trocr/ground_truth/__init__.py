"""Ground truth as people have it: PAGE, ALTO, IAM, tables, pairs, data set objects; what is left out and why."""

__all__: list[str] = []
