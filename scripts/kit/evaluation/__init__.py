"""The method measured in the small world. Names and titles here; what needs packages is in the modules beside."""

METHODS = {
    "none": "no subject",
    "one_value": "one value per token",
    "decoupled": "decoupled attention",
    "nested": "nested attention",
}
#: Parts of the evaluation, in the order in which they are made, and of the page.
TITLES = {
    "table": "One subject",
    "frontier": "Identity and prompt, over strengths",
    "order": "Looks that are said before the class word, and after it",
    "budget": "Identity and prompt, by how long was trained",
    "pairs": "Two subjects in one picture",
    "apart": "Two subjects, with Separate Subjects",
    "nodes": "One subject, in ComfyUI through the nodes",
    "attention": "Attention on the class word, by what is drawn there (base model, half noised)",
    "tokens": "Number of subject tokens (each number is an encoder of its own)",
    "separation": "Two subjects, with separation",
    "identity": "identity (α), as a factor on the encoder's own",
    "focus": "focus",
    "unconditional": "What the negative prompt has, by cfg",
    "views": "Number of reference pictures",
}
