"""What ComfyUI loads: the entry point of the node pack and its scripts for the browser."""

from .nodes import comfy_entrypoint as comfy_entrypoint

WEB_DIRECTORY = "./web"
