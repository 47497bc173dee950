"""The commands of the command line: each a file with its settings, `Arguments`, and a function `run`.

What takes long to import is imported inside functions, so that mistakes in options are told first.
"""

COMMANDS = {
    "quickstart": "train, compose and score an adapter on handwritten digits, in minutes on a CPU",
    "check-data": "count contexts and find what would spoil a training",
    "train": "fine-tune an adapter on a diffusers pipeline",
    "train-text": "fine-tune an adapter on a language model of transformers",
    "train-autoencoder": "train the paper's autoencoder on images in contexts",
    "info": "say what an adapter holds, and whether it fits a base",
    "generate": "make images in chosen contexts",
    "generate-text": "write texts in chosen contexts",
    "edit": "show what given images would have been in other contexts",
    "evaluate": "measure an adapter on its data: does it compose?",
    "demo": "show an adapter on a web page",
    "export": "write contexts as plain LoRA files for other tools",
    "merge": "write the base with one context in its weights",
    "push": "put an adapter on the Hub, with samples and a card",
    "completion": "print what completes commands and options in bash and zsh",
}
