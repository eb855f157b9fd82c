"""What a person or a script does with a model: prompts, settings, text, the loop at a terminal."""
