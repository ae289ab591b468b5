"""Where things are in a video: masks, an object's motion, windows that follow it."""
