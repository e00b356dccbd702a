"""The closed-form start of routers: initial parameters from the gradients of the frozen model."""
