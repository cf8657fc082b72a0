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
        "1. **Load a photo of your subject**, with a clear face. Of several faces the largest is taken.\n"
        "2. **Write <person> in the prompt** where the subject belongs. Everything else works as always.\n"
        "3. **Run, and look at *What the encoder sees***: the whole face should be there, upright and large.\n\n"
        "Another word than <person>, or a dog: change *placeholder* and *class_word* in **Encode Subject**.",
        600,
    )  # fmt: skip
    t.note(
        "If the picture is not right",
        "- **Too little likeness**: *strength* up to 1.5, or a photo in which the face is larger.\n"
        "- **The prompt is ignored**: *strength* 0.7, or *start_percent* 0.1.\n"
        "- **The encoder sees the wrong face**: in **Crop Subject** *face* to *number*, counted from the left.\n"
        '- **"No positive prompt mentions <person>"**: the prompt needs that word, and the *clip* that comes out of '
        "**Apply Subject**.",
        560,
    )  # fmt: skip
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
        "For a ComfyUI without face detection (0.18.2 has none, 0.30.0 has it), and for faces that it does not "
        "find.\n\n"
        "1. **Load a photo, and paint the face**: right click on it, *Open in Mask Editor*; from the hairline to the "
        "chin, from ear to ear. Save.\n"
        "2. **Write <person> in the prompt** where the subject belongs.\n"
        "3. **Run, and look at *What the encoder sees***: the face, with hair and chin, in the middle.\n\n"
        "A tilted head stays tilted: turn the photo upright first.",
        640,
    )  # fmt: skip
    t.note(
        "If the picture is not right",
        "- **The face is small in what the encoder sees**: *margin* down. **Hair or chin are cut off**: up.\n"
        "- **Too little likeness**: *strength* up to 1.5, or a photo in which the face is larger.\n"
        '- **"The mask is empty"**: nothing is painted yet.',
        560,
    )  # fmt: skip
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
        "1. **A photo of each**. Each **Encode Subject** has its own word: <anna>, <ben>.\n"
        "2. **Both words in the prompt**, each with a place or a deed of its own: it is the prompt that decides who "
        "stands where.\n"
        "3. **A third one**: copy Load Image, Encode and Apply Subject, give it another word, and put its Apply into "
        "the line.",
        600,
    )  # fmt: skip
    t.note(
        "If the two melt into each other",
        "- Say in the prompt what each of them does, and where.\n"
        "- Give each a *mask*: template *regional_masks*.\n"
        "- Put **Separate Subjects** before the sampler.\n"
        "- See who is where: template *who_is_where*.",
        480,
    )  # fmt: skip
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
        "1. **Photos of the same subject**: front, side, another day. What one photo hides, another shows.\n"
        "2. **weights** in Merge Subjects: empty, all count the same. 1, 0.5, 2: one number each, in the order of "
        "the inputs; 0 leaves a view out.\n"
        "3. Two views: remove a link. More: connect to the free input that appears.\n\n"
        "All views share one placeholder and one class word.",
        600,
    )  # fmt: skip
    t.note(
        "Good to know",
        "- A view with the face half hidden costs more than it brings: look at *seen* of each Encode Subject.\n"
        "- Photos of equal size can also go into one Encode Subject as an image batch.\n"
        "- Two *different* subjects are not merged: template *two_subjects*.",
        480,
    )  # fmt: skip
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
        "1. **Load a photo, run.** The file goes to *output/nested_subjects*: a few megabytes, without the photo.\n"
        "2. **Press R** (refresh), then open the template *reuse_subject*: Load Subject has it in its list.\n\n"
        "It works with the encoder that made it. Give it to others: into their *models/nested_subjects*.",
        620,
    )  # fmt: skip
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
        "1. **Save one first** with the template *save_subject*; press R, then choose it in **Load Subject**.\n"
        "2. **Its word** is the one it was saved with (<anna>). Another one: write it into *placeholder*.\n\n"
        "No photo and no vision model is needed any more.",
        600,
    )  # fmt: skip
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
        "1. **A photo of each**, each with a word of its own.\n"
        "2. **Who may be where**: here the two halves. For a shape of your own, connect a painted mask instead (Load "
        "Image, right click, *Open in Mask Editor*; its *MASK* output).\n"
        "3. **The prompt** still says who stands where: a mask says where a subject *may* be, not that it must.\n"
        "4. **Separate Subjects** keeps the two apart inside the model too. Without it: bypass (Ctrl+B).",
        640,
    )  # fmt: skip
    t.note(
        "Good to know",
        "- Masks are stretched over the picture: any size does.\n"
        "- Where masks overlap, both subjects may act.\n"
        "- A soft edge looks better than a hard one.",
        420,
    )  # fmt: skip
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
        "1. **Your subject**: a photo, as always.\n"
        "2. **The composition**: another picture; of it only the outlines count.\n"
        "3. **The prompt** with <person>.\n\n"
        "A LoRA goes before or after Apply Subject: the picture is the same. ControlNet works on the conditioning, "
        "after the text encode nodes.",
        600,
    )  # fmt: skip
    t.note(
        "If the two fight",
        "- **The face follows the outlines, not your subject**: *end_percent* of Apply ControlNet down to 0.4, or its "
        "*strength*.\n"
        "- **The LoRA paints over the subject**: its strength down, or *strength* of Apply Subject up to 1.3.\n"
        "- Any SDXL LoRA will do, and any SDXL ControlNet for outlines (Canny).",
        520,
    )  # fmt: skip
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
        "1. **Who**: a photo of your subject.\n"
        "2. **Into which picture**: right click on it, *Open in Mask Editor*, paint over the face, save. Without a "
        "mask nothing changes. Pictures of about a megapixel work best; Upscale Image makes others fit.\n"
        "3. **What the picture shows**, with <person> for the one inside the mask.\n\n"
        "Plain img2img: paint the whole picture, and set *denoise* to 0.5.",
        640,
    )  # fmt: skip
    t.note(
        "If it does not fit in",
        "- **Still the old face**: *denoise* up to 0.9.\n"
        "- **Hair or light do not fit**: a larger mask, *denoise* 0.6.\n"
        "- **A small face**: crop it, enlarge it to 1024, inpaint, paste it back (Crop Image, Upscale Image).",
        520,
    )  # fmt: skip
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
    t.group("1. Two subjects")
    t.photo("photo_anna", "Photo of <anna>")
    t.encode("anna", t.face("face_anna", "photo_anna", "<anna>"), "<anna>", "woman", "Encode <anna>")
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
        "1. **Two photos**, each with a word of its own. 2. **Both words in the prompt.**\n"
        "3. **Who is where**: the heat of each word, and the mask of the one that *placeholder* names.\n"
        "4. **Why one point looks as it does**: x and y from 0 to 1.\n"
        "5. **A second pass** changes that subject alone, inside its mask.\n\n"
        "Record Attention leaves the picture as it is, bit for bit.",
        640,
    )  # fmt: skip
    t.note(
        "If the mask does not fit",
        "- **Too small**: *threshold* down, or *expand* up in Grow Mask. Attention is on what a word decides: face and "
        "body more than hat and shoes.\n"
        "- **The two are one**: a place for each in the prompt; a mask for each in **Apply Subject**; **Separate "
        "Subjects** before **Record Attention**.\n"
        "- **Another subject**: its word as *placeholder*.",
        600,
    )  # fmt: skip
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
        "1. **Your photo, your prompt**, a fixed seed.\n"
        "2. **What to try**: numbers with commas between them. Nine pairs are nine pictures, one after the other.\n"
        "3. Choose the pair that keeps the face *and* obeys the prompt; write it into your own graph.\n\n"
        "*identity* is alpha: how loud the subject's values are. 2 is what the public encoder was trained with.",
        620,
    )  # fmt: skip
    t.note(
        "Other knobs",
        "Drag *across* or *down* onto any other knob with decimals: *start_percent*, *focus*, *cfg*, a LoRA's "
        "strength. Change the titles in **Grid Values** with it.",
        420,
    )  # fmt: skip
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
        "check", "NestedCheckEncoder", height=400, model=MODEL, clip=CLIP, vae=("checkpoint", "VAE"),
        encoder=("encoder", "encoder"), clip_vision=("tower", "CLIP_VISION"), photos=("faces", "image"),
    )  # fmt: skip
    t.node("report", "PreviewAny", "The report", height=420, source=("check", "report"))
    t.column(620)
    t.group("3. What was found")
    t.node("chart", "PreviewImage", "How far above the best each setting is", height=420, images=("check", "chart"))
    t.node("photos_seen", "PreviewImage", "The photos, as the encoder sees them", height=290, images=("faces", "image"))
    t.note(
        "How to use this",
        "1. **Load six photos of six people.** More are better: another Load Image and Batch Images.\n"
        "2. **Run.** The node says how many passes of the model are ahead; one is about one sampling step.\n"
        "3. **Read.** Which settings the encoder was most likely trained with, how sure that is, and whether it does "
        "anything on this checkpoint at all.\n\n"
        "What is sure is written beside the encoder's file: **Load Nested Encoder** uses it where it says *auto*. Once "
        "is enough.",
        620,
    )  # fmt: skip
    t.note(
        "If it does nothing",
        "- **Another checkpoint**: the public encoder is for SDXL base and what was made from it.\n"
        "- **The vision model**: the one that the encoder was trained with, CLIP ViT-H/14 for the public one.\n"
        "- **The photos**: look at them below. Faces must be whole, upright and large.\n"
        "- **A LoRA** on the model: check without it first.",
        560,
    )  # fmt: skip
    t.files_note()


TEMPLATES: dict[str, Callable[[Template], None]] = {
    f.__name__: f
    for f in (
        first_portrait, portrait_by_hand, two_subjects, several_views, save_subject, reuse_subject, regional_masks,
        controlnet_and_lora, inpaint_face, who_is_where, strength_identity_grid, check_encoder,
    )
}  # fmt: skip
