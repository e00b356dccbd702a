"""The closed-form start of routers."""
