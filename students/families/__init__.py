"""Students of each family of models: language, image, vision-language."""
