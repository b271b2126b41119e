"""A plain reward server, as trainers bring one along: FastAPI, transformers, one padded batch for each call.

`python -m tests.benchmarks.reward_server FOLDER PORT`. A contestant, not a part of the service. A call blocks the
event loop while it computes, as in the server it stands for.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Queries(BaseModel):
    """Whole dialogues as text; the prompts are sent along and not looked at."""

    query: list[str]
    prompts: list[str] = []


def application(folder: str) -> FastAPI:
    """The server of one model."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.post("/get_reward")
    async def get_reward(queries: Queries) -> dict[str, list[float]]:
        with torch.inference_mode():
            batch = tokenizer(queries.query, return_tensors="pt", padding=True, add_special_tokens=False)
            last = batch["attention_mask"].sum(dim=1) - 1
            hidden = model.base_model(**batch, use_cache=False).last_hidden_state
            return {"rewards": model.score(hidden[torch.arange(len(last)), last])[:, 0].tolist()}

    return app


if __name__ == "__main__":
    uvicorn.run(application(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="error")
