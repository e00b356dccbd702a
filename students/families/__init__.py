"""Students by what their model is: language, image, vision-language."""
