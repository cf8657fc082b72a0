"""Which settings an encoder was trained with, measured: under them the denoising error of photos is lowest.

A file of somebody else's does not say which image features its encoder reads, how v* is rescaled (equation 4 of arXiv
2501.01407) or where the pooled text vector is taken. Photos of subjects, seen through the encoder, help the U-Net to
denoise those same photos, and most under the settings of the training. Every combination sees the same photos with the
same noise, so differences are paired and a handful of photos is enough.

`settings` lists the combinations, `search` measures few of them often and the others little, `statistics` says how sure
the outcome is, `verdict` says it in words, `chart` draws it. What computes a loss is a `search.Bench`: one on diffusers
(`diffusers`; the command `python -m nested_core.check`), one on ComfyUI (`hosts.comfy.check`).
"""
