"""The picture world: images, questions about them, and the small models that answer."""
