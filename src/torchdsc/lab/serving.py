"""A saved model or adapter behind an OpenAI-compatible endpoint: transformers' own server."""

from pathlib import Path
from typing import Any

import torch

from torchdsc.lab.saved import load_saved
from torchdsc.lab.training.generation import generates

__all__ = ["serve"]


def serve(
    folder: str | Path, *, base: str | None = None, host: str = "localhost", port: int = 8000, device: str = "auto"
) -> None:
    """Serve a model until the process is interrupted.

    Transformers' server looks for architectures among its own alone. Here it is given the loaded model: a DSCGPT, a
    converted model, or an adapter on its base. Requests call it by the name of the folder that holds it ("model" in a
    run's), which is printed and stands under ``/v1/models``. There is no authentication.

    Args:
        folder: See :func:`torchdsc.lab.saved.load_saved`.
        base: The base model of an adapter; by default the one that it names.
        host: To listen on.
        port: The same; 1 to 65535.
        device: "auto" for an accelerator where there is one, or torch's name of a device.

    Raises:
        ImportError: If the extra "serve" is missing.
        FileNotFoundError: If there is no model.
        ValueError: If there is no tokenizer beside the model, the model is one that torchdsc knows nothing of, or
            ``port`` or ``device`` is out of its range.
    """
    try:
        import uvicorn  # noqa: F401
        from transformers.cli import serve as server
        from transformers.cli.serving import model_manager
        from transformers.cli.serving import server as endpoints
    except ImportError as error:
        raise ImportError("serving needs fastapi and uvicorn: pip install 'torchdsc[serve]'") from error
    if not 1 <= port <= 65535:
        raise ValueError(f"port must be 1 to 65535, got {port}")
    saved = load_saved(folder, base=base)
    if saved.tokenizer is None:
        raise ValueError(f"folder must hold a tokenizer beside its model, and there is none in {saved.folder}")
    if not generates(saved.model):
        raise ValueError(f"the model in {saved.folder} must generate text, and is a {type(saved.model).__name__}")
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = "cpu" if accelerator is None else accelerator.type
    try:
        saved.model.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device must be one that this machine has, got {device!r}: {error}") from error
    saved.model.generate = _within_positions(saved.model)

    # Without the sign that begins a revision.
    name = saved.folder.resolve().name.replace("@", "-")

    class Manager(model_manager.ModelManager):
        """Knows one model, which is loaded."""

        _load_model, _load_processor = _returning(saved.model), _returning(saved.tokenizer)
        get_gen_models = _returning([{"id": name, "object": "model", "created": 0, "owned_by": "torchdsc"}])

    if saved.tokenizer.chat_template is None:
        print("the tokenizer has no chat template: completions alone, no chat", flush=True)
    print(f"{saved.kind} as {name!r} at http://{host}:{port}/v1", flush=True)
    # What the server is made of.
    own, model_manager.ModelManager = model_manager.ModelManager, Manager
    build, endpoints.build_server = endpoints.build_server, _telling(endpoints.build_server)
    try:
        server.Serve(force_model=name, device=device, host=host, port=port)
    finally:
        model_manager.ModelManager, endpoints.build_server = own, build


def _within_positions(model: Any) -> Any:
    """The model's ``generate`` for no more tokens than it has positions: a request need not say how many it wants."""
    generate, positions = model.generate, getattr(model.config, "max_position_embeddings", None)

    def bounded(*args: Any, **kwargs: Any) -> Any:
        length = kwargs["input_ids"].shape[-1]
        if length == 0:
            raise ValueError("the prompt must have a token, and is empty")
        if positions is None:
            return generate(*args, **kwargs)
        if length >= positions:
            raise ValueError(
                f"the prompt must leave room in the model's {positions} positions, and has {length} tokens"
            )
        config = kwargs["generation_config"]
        config.max_new_tokens = min(config.max_new_tokens, positions - length)
        return generate(*args, **kwargs)

    return bounded


def _telling(build: Any) -> Any:
    """The server with an answer that names what is wrong with a request."""

    def built(*args: Any, **kwargs: Any) -> Any:
        from fastapi.responses import JSONResponse

        app = build(*args, **kwargs)

        @app.exception_handler(ValueError)
        async def refuse(request: Any, error: ValueError) -> JSONResponse:
            return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)

        return app

    return built


def _returning(value: Any) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return value

    return method
