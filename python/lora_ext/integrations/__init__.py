"""Models of other libraries with lora_ext's layers in them."""
