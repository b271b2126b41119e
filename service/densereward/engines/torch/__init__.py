"""Transformers models in this process. A batch is one packed forward pass: no padding, no attention maps.

Loading, in the order of the calls:

    weights            names and shapes of a checkpoint's weights, from the files' headers
    adapters           LoRA adapters, merged into their base model
    loading            the model of a checkpoint, and its head
    facts              what the engine says of it; linear and memory make it fast on a CPU

A batch on its way through `engine` (reward models) or `language_model`:

    chunks             a sequence with the closing tokens of its closed prefixes, cut if it is too long for a pass
    packing            the chunks of a batch in one row of tokens; packed_batch says where everything is
    kv_cache           keys and values of prompts that come again, and of a long sequence's earlier chunks
    passes             runs the decoder, reads the head, copies the results back
    attention          called by the model in each layer: attention of the packed row, by the kernels
    attention_capture  called there: the scored tokens' attention rows, and the attention that tokens received
    contributions      the scored tokens once more, for what each token adds to the score
    gradients          one differentiable pass per sequence that needs it

    pair               the difference of two language models
    unpacked           the engine for models that cannot be packed: transformers_pass runs them, probes finds out what
                       they can give
    float32            a half-precision model in float32 arithmetic, for checks
    failures           torch's errors as an engine's
"""
