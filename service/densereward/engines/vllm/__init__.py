"""The vLLM engine: vLLM's client runs here, and attention rows come from vLLM's workers.

model           which models vLLM is given, and with which arguments
engine          starts vLLM, hands sequences over, and turns what it returns into what methods read
loop_thread     the event loop of vLLM's client
worker          inside vLLM's processes: hooks that capture queries and keys, and append rows to the scores
layers          there too: the layers whose attention can be captured
attention_rows  a request for rows, and how rows are computed
facts           what the engine says of the model
checks          at the start: rows against vLLM's kernels, and prefix scores
"""
