"""The composition root: data, training and evaluation put together and launched on ranks."""
