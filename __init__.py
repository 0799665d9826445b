"""What ComfyUI loads: the entry point of the node pack."""

# pytest imports this file as a module without a parent; ComfyUI always gives it a package
if __package__:
    from .nodes import comfy_entrypoint as comfy_entrypoint
