"""Writes GGUF files of tiny models, with the names and the order of weights that such files have."""

import gguf

Q8 = gguf.GGMLQuantizationType.Q8_0


def write(path, architecture, tensors, numbers=(), quantized=True):
    """Write tensors, matrices in eight bits where their rows can be cut into blocks."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, number in dict(numbers).items():
        writer.add_uint32(f"{architecture}.{name}", number)
    for name, tensor in tensors.items():
        values = tensor.detach().float().numpy()
        fits = quantized and values.ndim == 2 and values.shape[1] % gguf.GGML_QUANT_SIZES[Q8][0] == 0
        kind = Q8 if fits else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_denoiser(path, transformer):
    """Under diffusers' own names, which it reads beside those of the first publication."""
    return write(path, "any", transformer.state_dict())


def write_llama(path, model):
    """As llama.cpp does, which turns the halves of rotary positions into pairs."""
    config, weights = model.config, model.state_dict()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if (count := heads.get(module.rpartition(".")[2])) is not None:
            weight = weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        tensors[f"{names.get_name(module)}.weight"] = weight
    numbers = {"attention.head_count": heads["q_proj"], "attention.head_count_kv": heads["k_proj"]}
    return write(path, "llama", tensors, numbers)
