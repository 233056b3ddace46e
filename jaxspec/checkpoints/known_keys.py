"""Keys of a `config.json` that no reader uses: those with any value, and those with few.

`JsonConfig.finish` looks up every key that was not read. A key in `HARMLESS` describes the
file, training or another program. A key in `NEUTRAL` changes what the model computes except at
the listed values: any other value is refused by the key's name.
"""

from __future__ import annotations

from typing import Any

HARMLESS = frozenset(
    # the file and the program that wrote it
    "architectures auto_map dtype torch_dtype transformers_version transformers_weights "
    "model_name name_or_path license library_name tokenizer_class custom_pipelines "
    "transformers.js_config unsloth_fixed unsloth_version unsloth_tokenized seq_length "
    "is_llama_config max_sequence_length tokenizer_model_max_length model_max_length "
    "hf_version format_version has_no_defaults_at_init "
    # how another program computes the same function
    "use_cache attn_implementation use_flash_attn use_flash_attention flash_attn "
    "pretraining_tp chunk_size_feed_forward torchscript use_bfloat16 use_mps return_dict "
    "return_dict_in_generate gradient_checkpointing cache_implementation low_cpu_mem_usage "
    "fuse_cross_entropy fuse_norm use_fused_ops ep_size "
    # training
    "attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout "
    "hidden_dropout_prob attention_probs_dropout_prob classifier_dropout initializer_range "
    "initializer_factor init_std router_aux_loss_coef router_z_loss_coef "
    "output_router_logits router_jitter_noise problem_type id2label label2id num_labels "
    "finetuning_task ignore_index "
    # ids that do not end a text, and other programs' generation defaults
    "bos_token_id pad_token_id unk_token_id sep_token_id cls_token_id "
    "decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens "
    "begin_suppress_tokens bad_words_ids prefix task_specific_params do_sample temperature "
    "top_k top_p min_p typical_p max_length min_length max_new_tokens num_beams "
    "num_beam_groups num_return_sequences diversity_penalty length_penalty early_stopping "
    "repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "exponential_decay_length_penalty remove_invalid_values output_attentions "
    "output_hidden_states output_scores "
    # without effect unless another key is set: use_sliding_window, a kind of rotary scaling
    "max_window_layers original_max_position_embeddings "
    # multi-token-prediction heads, which are not loaded
    "mtp mtp_num_hidden_layers mtp_use_dedicated_embeddings".split()
)

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # attention
    "alibi": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attention_sink_bias": (False,),
    "attention_value_scale": (1.0,),
    "attn_logit_softcapping": (0,),
    "attn_output_gate": (False,),
    "clip_qkv": (),
    "dual_chunk_attention_config": (),
    "is_causal": (True,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "qkv_bias": (False,),
    "use_bias": (False,),
    "bias": (False,),
    "use_sinks": (False,),
    "attention_sinks": (False,),
    "use_swa": (False,),
    "swa_window_size": (),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (0,),
    "layer_rope_theta": (),
    "full_attention_interval": (1,),
    "output_gate_type": (),
    "mamba_ssm_dtype": ("float32",),
    "use_mla": (False,),
    "kv_lora_rank": (0,),
    "q_lora_rank": (0,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "cross_layer_kv_sharing": (False,),
    "num_kv_shared_layers": (0,),
    # rotary positions; `rope_parameters` and `rope_scaling` are read
    "partial_rotary_factor": (1.0,),
    "rotary_pct": (1.0,),
    "rotary_percent": (1.0,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "rope_is_neox_style": (True,),
    "mrope_interleaved": (False,),
    "mrope_section": (),
    "use_mrope": (False,),
    "position_embedding_type": ("rope", "absolute"),
    # norms
    "norm_type": ("rms_norm", "rmsnorm"),
    "normalization_type": ("rms_norm", "rmsnorm"),
    "use_gemma_norm": (False,),
    "add_unit_offset": (False,),
    "norm_after": (False,),
    "use_post_norm": (False,),
    # scales and caps
    "embedding_multiplier": (1.0,),
    "input_embedding_scale": (1.0,),
    "scale_emb": (1,),
    "scale_depth": (),
    "residual_multiplier": (1.0,),
    "residual_scale": (1.0,),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "output_multiplier": (1.0,),
    "final_logit_softcapping": (0,),
    # mixtures of experts
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "n_shared_experts": (0,),
    "num_shared_experts": (0,),
    "shared_expert_intermediate_size": (0,),
    "mlp_only_layers": ([],),
    "n_group": (1,),
    "topk_group": (1,),
    "topk_method": ("greedy",),
    "routed_scaling_factor": (1.0,),
    "scoring_func": ("softmax",),
    "score_function": ("softmax",),
    "moe_router_enable_expert_bias": (False,),
    # changed weights
    "pruned_heads": ({}, []),
}
