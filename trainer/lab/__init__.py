"""The laboratory: experiments on top of the trainer, which imports nothing from here."""
