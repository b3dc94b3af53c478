"""Prior preservation: the class images that a run is also trained on, generated or a user's own."""

__all__: list[str] = []
