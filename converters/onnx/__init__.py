"""`build --target onnx`: a decoder with KV cache for onnxruntime and onnxruntime-genai.

The graph is built here and not by an exporter that traces the model. transformers' OnnxExporter was
weighed against it: it covers more architectures, but writes a prefill and a decode graph with
inputs that onnxruntime-genai does not know, fuses the experts of a CPU graph into no MoE node, and
would need a second pass to bring in QMoE, per-expert widths and external weights. What is written
here is one graph of about twenty nodes per layer with the input names of onnxruntime-genai, its
weights never enter the protobuf or this process as a whole, and its logits equal those of
transformers to 1e-6. A family whose attention and router are like those of one that is there is a
line in `edge_moe.candidates.ONNX_FAMILIES`, and an entry in layouts.py where its parts have other
names.

    graph.py        nodes and initializers, the protobuf and its limit
    data_files.py   where every weight lies in the external files, and writing them
    operations.py   norms, linear layers and attention, as contrib or as standard operations
    decoder.py      the layers
    feed_forward.py what a layer does to every token by itself: experts, or a dense MLP
    activations.py  what experts do between their two products
    head.py         from hidden states to logits
    layouts.py      what families call the parts of a layer
    weights.py      dense tensors of the checkpoint, and which of them were used
    states.py       what a layer keeps from one run to the next
    mixer.py        what looks back in a layer: attention.py, recurrent.py
    heads.py        the shape of attention in every layer
    recurrences.py  causal convolution and linear attention
    rope.py         rotary tables
    routing.py      the router's weights from standard operations
    experts.py      MoE and QMoE nodes, one per width
    branches.py     one If per expert over the same bytes: where no MoE node has the activation, and
                    without contrib operations for validation
    gemma.py        Gemma 4's layers, which are built in another way
    genai.py        genai_config.json
    export.py       the folder
"""
