"""The templates of workflows/, each written down as columns of nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .template import CLIP, CONTROLNET, LORA, MODEL, POSITIVE, Template


def first_portrait(t: Template) -> None:
    t.column(370)
    t.loaders()
    t.column(330)
    t.group("1. Your subject")
    t.photo("photo", "Photo of your subject")
    face = t.face("face", "photo")
    t.column(320)
    t.group("Bind it to its word")
    t.encode("subject", face, "<person>", "person")
    t.apply("apply", ("subject", "subject"), MODEL, CLIP)
    t.node("seen", "PreviewImage", "What the encoder sees", height=290, images=("subject", "seen"))
    t.picture(
        ("apply", "model"), ("apply", "clip"), "a photo of <person> in a garden, soft light",
        "Prompt with <person>", 330, "2. Your prompt", "3. Your picture",
    )  # fmt: skip
    t.note(
        "How to use this",
        "1. Load a photo with a clear face.",
        "2. Write <person> in the prompt where the subject belongs.",
        "3. Run. *What the encoder sees* must be a whole face.",
        "Another word than <person>: in Encode Subject.",
        width=600,
    )
    t.note(
        "If the picture is not right",
        "Too little likeness: *strength* 1.5, or a larger face.",
        "The prompt is ignored: *strength* 0.7.",
        "The wrong face: in Crop Subject *face* to *number*.",
        "A message that no prompt mentions <person>: write it there.",
        width=600,
    )
    t.files_note()


def portrait_by_hand(t: Template) -> None:
    """For hosts that find no faces."""
    t.column(370)
    t.loaders(face=False)
    t.column(330)
    t.group("1. Your subject")
    t.photo("photo", "Photo, with the face painted as its mask")
    t.node("face", "NestedCropSubject", widgets={"margin": 0.3}, image=("photo", "IMAGE"), mask=("photo", "MASK"))
    t.column(320)
    t.group("Bind it to its word")
    t.encode("subject", ("face", "image"), "<person>", "person")
    t.apply("apply", ("subject", "subject"), MODEL, CLIP)
    t.node("seen", "PreviewImage", "What the encoder sees", height=290, images=("subject", "seen"))
    t.picture(
        ("apply", "model"), ("apply", "clip"), "a photo of <person> in a garden, soft light",
        "Prompt with <person>", 330, "2. Your prompt", "3. Your picture",
    )  # fmt: skip
    t.note(
        "How to use this",
        "1. Load a photo, paint the face: right click on it, *Open in Mask Editor*.",
        "2. Write <person> in the prompt where the subject belongs.",
        "3. Run. *What the encoder sees* must be a whole face.",
        "A tilted head: turn the photo upright first.",
        width=620,
    )
    t.note(
        "If the picture is not right",
        "The encoder sees too much: *margin* down. Hair or chin cut off: up.",
        "Too little likeness: *strength* 1.5, or a larger face.",
        "A message that the mask is empty: paint the face.",
        width=600,
    )
    t.files_note()


def two_subjects(t: Template) -> None:
    t.column(370)
    t.loaders()
    t.column(330)
    t.group("1. The first subject")
    t.photo("photo_anna", "Photo of <anna>")
    t.encode("anna", t.face("face_anna", "photo_anna", "<anna>"), "<anna>", "woman", "Encode <anna>")
    t.column(330)
    t.group("1. The second subject")
    t.photo("photo_ben", "Photo of <ben>")
    t.encode("ben", t.face("face_ben", "photo_ben", "<ben>"), "<ben>", "man", "Encode <ben>")
    t.column(330)
    t.group("One after the other")
    t.apply("apply_anna", ("anna", "subject"), MODEL, CLIP, "Apply <anna>")
    t.apply("apply_ben", ("ben", "subject"), ("apply_anna", "model"), ("apply_anna", "clip"), "Apply <ben>")
    t.picture(
        ("apply_ben", "model"), ("apply_ben", "clip"),
        "a photo of <anna> on the left and <ben> on the right, in a garden, soft light",
        "Prompt with <anna> and <ben>", 350, "2. A prompt with both words", "3. The picture",
    )  # fmt: skip
    t.note(
        "How to use this",
        "1. A photo of each: one is <anna>, one is <ben>.",
        "2. Both words in the prompt: it says who is where.",
        "A third one: copy Load Image, Encode and Apply Subject, with a word of its own.",
        width=620,
    )
    t.note(
        "If the two melt into each other",
        "In the prompt, give each a place and something to do.",
        "Give each a *mask*: template *regional_masks*.",
        "Put Separate Subjects before the sampler.",
        width=560,
    )
    t.files_note()


def several_views(t: Template) -> None:
    t.column(370)
    t.loaders()
    t.column(300)
    t.group("1. Views of ONE subject")
    for number in (1, 2, 3):
        t.photo(f"photo{number}", f"View {number}")
    t.column(320)
    t.group("The face of each")
    faces = [t.face(f"face{number}", f"photo{number}", f"view {number}") for number in (1, 2, 3)]
    t.column(320)
    t.group("Each is encoded")
    for number, face in enumerate(faces, 1):
        t.encode(f"view{number}", face, "<person>", "person", f"Encode view {number}")
    t.column(320)
    t.group("One subject")
    views: dict[str, Any] = {f"subjects__subject_{n}": (f"view{n}", "subject") for n in (1, 2, 3)}
    t.node(
        "subject", "NestedMergeSubjects", widgets={"weights": ""},
        **views,
    )  # fmt: skip
    t.apply("apply", ("subject", "subject"), MODEL, CLIP)
    t.picture(
        ("apply", "model"), ("apply", "clip"), "a photo of <person> reading in a library",
        "Prompt with <person>", 330, "2. Your prompt", "3. Your picture",
    )  # fmt: skip
    t.note(
        "How to use this",
        "1. Photos of the same subject: front, side, another day.",
        "2. weights: empty, all count the same. 1, 0.5, 0: one number each.",
        "More views: connect them to the free input.",
        width=600,
    )
    t.note(
        "Good to know",
        "A face half hidden costs more than it brings.",
        "Two different subjects: template *two_subjects*.",
        width=560,
    )
    t.files_note()


def save_subject(t: Template) -> None:
    t.column(370)
    t.loaders(checkpoint=False)
    t.column(330)
    t.group("1. Your subject")
    t.photo("photo", "Photo of <anna>")
    face = t.face("face", "photo")
    t.column(330)
    t.group("Encode it once")
    t.encode("subject", face, "<anna>", "woman")
    t.node("seen", "PreviewImage", "What the encoder sees", height=290, images=("subject", "seen"))
    t.column(360)
    t.group("2. Keep it")
    t.node("save", "NestedSaveSubject", height=150, widgets={"filename_prefix": "anna"}, subject=("subject", "subject"))
    t.note(
        "How to use this",
        "1. Load a photo, run. The file is in *output/nested_subjects*.",
        "2. Press R, then open the template *reuse_subject*.",
        "To give it to others: into their *models/nested_subjects*.",
        width=560,
    )
    t.files_note()


def reuse_subject(t: Template) -> None:
    t.column(370)
    t.loaders(photo=False)
    t.group("1. Your saved subject")
    t.node("subject", "NestedLoadSubject", widgets={"subject_name": "anna_00001_.safetensors"},
           encoder=("encoder", "encoder"))  # fmt: skip
    t.column(320)
    t.group("Bind it to its word")
    t.apply("apply", ("subject", "subject"), MODEL, CLIP)
    t.column(350)
    t.group("2. As many prompts as you like")
    t.prompts(("apply", "clip"), "a photo of <anna> on a boat, morning light", "Prompt with <anna>")
    t.node(
        "positive2", "CLIPTextEncode", "Another prompt with <anna>", height=130, colours=POSITIVE,
        widgets={"text": "a charcoal drawing of <anna> at a piano"}, clip=("apply", "clip"),
    )  # fmt: skip
    t.size()
    t.column(300)
    t.group("Sample")
    t.sampler(("apply", "model"))
    t.decode()
    t.sampler(("apply", "model"), positive=("positive2", "CONDITIONING"), key="sampler2", seed=2)
    t.decode("decode2", "sampler2")
    t.column(380)
    t.group("3. Your pictures")
    t.save(height=380)
    t.node("save2", "SaveImage", height=380, widgets={"filename_prefix": f"nested_attention/{t.name}"},
           images=("decode2", "IMAGE"))  # fmt: skip
    t.note(
        "How to use this",
        "1. Save one first: template *save_subject*. Press R, choose it.",
        "2. Write <anna> in the prompts, or what it was saved with.",
        "No photo and no vision model is needed.",
        width=600,
    )
    t.files_note()


def regional_masks(t: Template) -> None:
    t.column(370)
    t.loaders()
    t.group("2. Who may be where")
    size = {"width": 1024, "height": 1024}
    t.node("black", "SolidMask", "The whole picture", widgets={"value": 0, **size})
    t.node("white", "SolidMask", "Half of it", widgets={"value": 1, **size, "width": 512})
    t.column(330)
    t.group("1. The first subject")
    t.photo("photo_anna", "Photo of <anna>")
    t.encode("anna", t.face("face_anna", "photo_anna", "<anna>"), "<anna>", "woman", "Encode <anna>")
    half: dict[str, Any] = {"destination": ("black", "MASK"), "source": ("white", "MASK")}
    t.node("left", "MaskComposite", "Left half", widgets={"x": 0, "y": 0, "operation": "add"}, **half)
    t.node("left_soft", "FeatherMask", "Its soft edge", widgets={"right": 64}, mask=("left", "MASK"))
    t.column(330)
    t.group("1. The second subject")
    t.photo("photo_ben", "Photo of <ben>")
    t.encode("ben", t.face("face_ben", "photo_ben", "<ben>"), "<ben>", "man", "Encode <ben>")
    t.node("right", "MaskComposite", "Right half", widgets={"x": 512, "y": 0, "operation": "add"}, **half)
    t.node("right_soft", "FeatherMask", "Its soft edge", widgets={"left": 64}, mask=("right", "MASK"))
    t.column(330)
    t.group("Each only there")
    t.apply("apply_anna", ("anna", "subject"), MODEL, CLIP, "Apply <anna>", mask=("left_soft", "MASK"))
    t.apply(
        "apply_ben", ("ben", "subject"), ("apply_anna", "model"), ("apply_anna", "clip"), "Apply <ben>",
        mask=("right_soft", "MASK"),
    )  # fmt: skip
    t.node("separate", "NestedSeparateSubjects", model=("apply_ben", "model"))
    t.picture(
        ("separate", "model"), ("apply_ben", "clip"),
        "a photo of <anna> on the left and <ben> on the right, on a bench in a park",
        "Prompt with <anna> and <ben>", 350, "3. A prompt with both words", "4. The picture",
    )  # fmt: skip
    t.note(
        "How to use this",
        "1. A photo of each, each with a word of its own.",
        "2. Who may be where: here the two halves. Or connect a painted mask.",
        "3. The prompt says who stands where: a mask only allows it.",
        width=620,
    )
    t.note(
        "Good to know",
        "Masks are stretched over the picture: any size does.",
        "A soft edge looks better than a hard one.",
        "Separate Subjects keeps the two apart inside the model.",
        width=560,
    )
    t.files_note()


def controlnet_and_lora(t: Template) -> None:
    t.column(370)
    t.loaders()
    t.node("lora", "LoraLoader", widgets={"lora_name": LORA, "strength_model": 0.7, "strength_clip": 0.7},
           model=MODEL, clip=CLIP)  # fmt: skip
    t.node("control", "ControlNetLoader", widgets={"control_net_name": CONTROLNET})
    t.column(330)
    t.group("1. Your subject")
    t.photo("photo", "Photo of your subject")
    t.encode("subject", t.face("face", "photo"), "<person>", "person")
    t.group("2. The composition")
    t.photo("pose", "Picture with the pose")
    t.column(330)
    t.group("Bind it to its word")
    t.apply("apply", ("subject", "subject"), ("lora", "MODEL"), ("lora", "CLIP"))
    t.group("Outlines for the ControlNet")
    t.node("edges", "Canny", image=("pose", "IMAGE"))
    t.node("edges_seen", "PreviewImage", "The outlines", height=290, images=("edges", "IMAGE"))
    t.column(350)
    t.group("3. Your prompt")
    t.prompts(("apply", "clip"), "a photo of <person> waving, city street at dusk", "Prompt with <person>")
    t.node(
        "controlled", "ControlNetApplyAdvanced", widgets={"strength": 0.7, "end_percent": 0.6},
        positive=("positive", "CONDITIONING"), negative=("negative", "CONDITIONING"),
        control_net=("control", "CONTROL_NET"), image=("edges", "IMAGE"),
    )  # fmt: skip
    t.size()
    t.column(300)
    t.group("Sample")
    t.sampler(("apply", "model"), positive=("controlled", "positive"), negative=("controlled", "negative"))
    t.decode()
    t.column(400)
    t.group("4. Your picture")
    t.save(height=440)
    t.note(
        "How to use this",
        "1. Your subject: a photo, as always.",
        "2. The composition: of that picture only the outlines count.",
        "3. The prompt with <person>.",
        width=600,
    )
    t.note(
        "If the two fight",
        "The face follows the outlines: in Apply ControlNet *end_percent* 0.4.",
        "The LoRA paints over the subject: its strength down.",
        "Any SDXL LoRA will do, and any SDXL ControlNet for outlines.",
        width=620,
    )
    t.files_note()


def inpaint_face(t: Template) -> None:
    t.column(370)
    t.loaders()
    t.group("1. Who")
    t.photo("photo", "Photo of your subject")
    face = t.face("face", "photo")
    t.column(350)
    t.group("2. Into which picture")
    t.photo("scene", "Picture, with the place painted as its mask", 340)
    t.node("grown", "GrowMask", widgets={"expand": 16}, mask=("scene", "MASK"))
    t.node("latent", "VAEEncode", pixels=("scene", "IMAGE"), vae=("checkpoint", "VAE"))
    t.node("masked", "SetLatentNoiseMask", samples=("latent", "LATENT"), mask=("grown", "MASK"))
    t.column(330)
    t.group("Bind it to its word, there")
    t.encode("subject", face, "<person>", "person")
    t.apply("apply", ("subject", "subject"), MODEL, CLIP, mask=("grown", "MASK"))
    t.node("soft", "DifferentialDiffusion", model=("apply", "model"))
    t.column(350)
    t.group("3. What the picture shows")
    t.prompts(("apply", "clip"), "a photo of <person>, detailed face", "Prompt with <person>")
    t.column(300)
    t.group("Sample")
    t.sampler(("soft", "MODEL"), latent=("masked", "LATENT"), denoise=0.75)
    t.decode()
    t.node(
        "back", "ImageCompositeMasked", "Only the mask changes", widgets={"x": 0, "y": 0, "resize_source": True},
        destination=("scene", "IMAGE"), source=("decode", "IMAGE"), mask=("grown", "MASK"),
    )  # fmt: skip
    t.column(400)
    t.group("4. Your picture")
    t.save(("back", "IMAGE"), height=440)
    t.note(
        "How to use this",
        "1. Who: a photo of your subject.",
        "2. Into which picture: right click on it, *Open in Mask Editor*, paint the face.",
        "3. The prompt: <person> is who stands inside the mask.",
        width=620,
    )
    t.note(
        "If it does not fit in",
        "Still the old face: *denoise* 0.9.",
        "Hair or light do not fit: a larger mask, *denoise* 0.6.",
        "A small face: enlarge that part first, paste it back after.",
        "Plain img2img: paint all of it, *denoise* 0.5.",
        width=560,
    )
    t.files_note()


def _second_pass(t: Template) -> None:
    """Inside the mask of the maps: another coat for one of two."""
    t.column(340)
    t.group("5. A second pass, inside the mask")
    t.node("grown", "GrowMask", widgets={"expand": 12}, mask=("maps", "mask"))
    t.node("masked", "SetLatentNoiseMask", samples=("sampler", "LATENT"), mask=("grown", "MASK"))
    t.node(
        "positive2", "CLIPTextEncode", "What to change", height=130, colours=POSITIVE,
        widgets={"text": "a photo of <anna> in a red coat on the left and <ben> on the right, in a garden, soft light"},
        clip=("apply_ben", "clip"),
    )  # fmt: skip
    t.sampler(
        ("apply_ben", "model"), latent=("masked", "LATENT"), positive=("positive2", "CONDITIONING"), key="sampler2",
        seed=2, denoise=0.65,
    )  # fmt: skip
    t.decode("decode2", "sampler2")


def who_is_where(t: Template) -> None:
    t.column(370)
    t.loaders()
    t.column(330)
    t.group("1. The first subject")
    t.photo("photo_anna", "Photo of <anna>")
    t.encode("anna", t.face("face_anna", "photo_anna", "<anna>"), "<anna>", "woman", "Encode <anna>")
    t.column(330)
    t.group("1. The second subject")
    t.photo("photo_ben", "Photo of <ben>")
    t.encode("ben", t.face("face_ben", "photo_ben", "<ben>"), "<ben>", "man", "Encode <ben>")
    t.column(330)
    t.group("Apply, and record")
    t.apply("apply_anna", ("anna", "subject"), MODEL, CLIP, "Apply <anna>")
    t.apply("apply_ben", ("ben", "subject"), ("apply_anna", "model"), ("apply_anna", "clip"), "Apply <ben>")
    t.node("record", "NestedRecordAttention", model=("apply_ben", "model"))
    t.column(350)
    t.group("2. The picture")
    t.prompts(
        ("apply_ben", "clip"), "a photo of <anna> on the left and <ben> on the right, in a garden, soft light",
        "Prompt with <anna> and <ben>",
    )  # fmt: skip
    t.size()
    t.column(330)
    t.group("Sample")
    t.sampler(("record", "model"))
    t.decode()
    t.node("picture", "PreviewImage", "The picture", height=330, images=("decode", "IMAGE"))
    t.column(350)
    t.group("3. Who is where")
    t.node("maps", "NestedAttentionMaps", widgets={"placeholder": "<anna>"}, recording=("record", "recording"),
           after=("decode", "IMAGE"))  # fmt: skip
    t.node("maps_seen", "PreviewImage", "Where each word was looked at", height=330, images=("maps", "image"))
    t.column(560)
    t.group("4. Why one point looks as it does")
    t.node("explain", "NestedExplain", widgets={"placeholder": "<anna>", "x": 0.3, "y": 0.35},
           recording=("record", "recording"), after=("decode", "IMAGE"))  # fmt: skip
    t.node("explained", "PreviewImage", "What the subject is there", height=430, images=("explain", "image"))
    _second_pass(t)
    t.column(380)
    t.group("6. Changed there alone")
    t.save(("decode2", "IMAGE"), height=400)
    t.note(
        "How to use this",
        "1. Two photos, each with a word. 2. Both in the prompt.",
        "3. Who is where: the mask is of the word in *placeholder*.",
        "4. Why one point looks as it does: x and y from 0 to 1.",
        "5. A second pass changes that subject alone.",
        width=640,
    )
    t.note(
        "If the mask does not fit",
        "Too small: *threshold* down, or *expand* up in Grow Mask.",
        "The two are one: give each a place in the prompt, or a mask.",
        "Another subject: its word as *placeholder*.",
        width=600,
    )
    t.files_note()


def strength_identity_grid(t: Template) -> None:
    t.column(370)
    t.loaders()
    t.column(330)
    t.group("1. Your subject")
    t.photo("photo", "Photo of your subject")
    t.encode("subject", t.face("face", "photo"), "<person>", "person")
    t.column(340)
    t.group("2. What to try")
    t.node("values", "NestedGridValues", widgets={"across": "0.6, 1, 1.4", "down": "1, 2, 4"})
    t.node(
        "apply", "NestedApplySubjectAdvanced", model=MODEL, clip=CLIP, subject=("subject", "subject"),
        strength=("values", "across"), identity=("values", "down"),
    )  # fmt: skip
    t.column(330)
    t.group("3. Your prompt")
    t.prompts(("apply", "clip"), "an oil painting of <person> in the mountains", "Prompt with <person>")
    t.size()
    t.column(300)
    t.group("Sample, once for each pair")
    t.sampler(("apply", "model"))
    t.decode()
    t.node("sheet", "NestedPictureGrid", images=("decode", "IMAGE"), grid=("values", "grid"))
    t.column(560)
    t.group("4. Strength across, identity down")
    t.save(("sheet", "image"), height=600)
    t.note(
        "How to use this",
        "1. Your photo, your prompt, a fixed seed.",
        "2. What to try: numbers with commas between them.",
        "3. Choose the pair that keeps the face and obeys the prompt.",
        width=620,
    )
    t.note(
        "Other knobs",
        "Drag *across* or *down* onto any other knob: *focus*, *cfg*, a LoRA's strength.",
        "Change the titles in Grid Values with it.",
        width=560,
    )
    t.files_note()


def check_encoder(t: Template) -> None:
    """Six photos in one batch: which settings was this encoder trained with?"""
    t.column(370)
    t.loaders()
    numbers = range(1, 7)
    for first in (1, 4):
        t.column(270)
        t.group(f"1. Photos of six people, {first} to {first + 2}")
        for number in range(first, first + 3):
            t.photo(f"photo{number}", f"Photo {number}")
    t.column(300)
    t.group("Together")
    photos: dict[str, Any] = {f"images__image{i}": (f"photo{number}", "IMAGE") for i, number in enumerate(numbers)}
    t.node("batch", "BatchImagesNode", **photos)
    batch = ("batch", "IMAGE")
    t.node(
        "faces_found", "MediaPipeFaceLandmarker", widgets={"detector_variant": "both", "num_faces": 0},
        face_detection_model=("detector", "FACE_DETECTION_MODEL"), image=batch,
    )  # fmt: skip
    t.node("faces", "NestedCropSubject", image=batch, face_landmarks=("faces_found", "face_landmarks"))
    t.column(470)
    t.group("2. Run, and read")
    t.node(
        "check", "NestedCheckEncoder", height=480, model=MODEL, clip=CLIP, vae=("checkpoint", "VAE"),
        encoder=("encoder", "encoder"), clip_vision=("tower", "CLIP_VISION"), photos=("faces", "image"),
    )  # fmt: skip
    t.node("report", "PreviewAny", "The report", height=420, source=("check", "report"))
    t.column(620)
    t.group("3. What was found")
    t.node("chart", "PreviewImage", "How far above the best each setting is", height=420, images=("check", "chart"))
    t.node("photos_seen", "PreviewImage", "The photos, as the encoder sees them", height=290, images=("faces", "image"))
    t.note(
        "How to use this",
        "1. Load six photos of six people. More are better.",
        "2. Run. It takes as long as many sampling steps.",
        "3. Read what the encoder was trained with, and how sure that is.",
        "What is sure is kept: Load Nested Encoder uses it.",
        width=640,
    )
    t.note(
        "If it does nothing",
        "Another checkpoint: SDXL base, or one made from it.",
        "Another vision model: CLIP ViT-H/14 for the public encoder.",
        "Photos: whole faces, upright and large.",
        width=600,
    )
    t.files_note()


TEMPLATES: dict[str, Callable[[Template], None]] = {
    f.__name__: f
    for f in (
        first_portrait, portrait_by_hand, two_subjects, several_views, save_subject, reuse_subject, regional_masks,
        controlnet_and_lora, inpaint_face, who_is_where, strength_identity_grid, check_encoder,
    )
}  # fmt: skip
