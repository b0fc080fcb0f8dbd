"""A source of drawn frames in a model's place: its colour says the prompt, its bar the time."""

import time

import numpy as np

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 220)}
GRAY = (128, 128, 128)


def drawn(size=(96, 160), count=12, seconds=0.1, chunks=None, first=None):
    """make(wish) for a Studio: chunks of `count` frames, each made in so many seconds.

    A word of the prompt is the colour of the picture. A bar moves by one column a frame. With an
    image, the first piece is one frame of its mean colour. chunks: how many there are (None: no
    end). first: frames of the first chunk, if it is shorter.
    """
    height, width = size

    def make(wish):
        if wish.image is not None:
            mean = wish.image[0].mean((0, 1)).astype(np.uint8)
            yield np.broadcast_to(mean, (1, height, width, 3)).copy()
        number = 0
        made = 0
        while chunks is None or number < chunks:
            words = wish.prompt().lower().split()
            colour = next((COLOURS[word] for word in words if word in COLOURS), GRAY)
            if "nan" in words:
                raise FloatingPointError("a chunk is not finite (damaged weights?)")
            if "memory" in words:
                raise MemoryError("12 GiB of 8")
            if "bug" in words:
                raise KeyError("a fault of the model")
            time.sleep(seconds)
            length = first if first and number == 0 else count
            frames = np.empty((length, height, width, 3), np.uint8)
            frames[:] = colour
            for i in range(length):
                frames[i, :, (made + i) % width] = 255
            yield frames
            number += 1
            made += length

    return make
