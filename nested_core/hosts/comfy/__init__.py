"""Nested attention inside ComfyUI.

Imports go one way: text, rows, values -> prompt, unet, store -> apart, recording -> layer -> run -> apply.
"""
