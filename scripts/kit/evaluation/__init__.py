"""The method measured in the small world. Names and titles here; what needs packages is in the modules beside."""

METHODS = {
    "none": "no subject",
    "described": "every attribute in the prompt",
    "one_value": "one value per token",
    "decoupled": "decoupled attention",
    "nested": "nested attention",
}
#: Parts of the evaluation, in the order of the page.
TITLES = {
    "table": "One subject",
    "pairs": "Two subjects in one picture",
    "separation": "Two subjects, with separation",
    "apart": "Two subjects, with Separate Subjects",
    "edits": "An attribute changed by the prompt",
    "strength": "Strength",
    "identity": "identity (α), as a factor on the encoder's own",
    "focus": "focus",
    "unconditional": "What the negative prompt has, by cfg",
    "tokens": "Number of subject tokens (each number is an encoder of its own)",
    "views": "Number of reference pictures",
    "attention": "Attention on the class word, by what is drawn there (base model, half noised)",
    "remedies": "Trained otherwise",
}
