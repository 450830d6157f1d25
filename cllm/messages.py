"""What is said to people: one table, English and Chinese, with stable codes.

The language follows `CLLM_LANG` (`zh` or `en`), else the locale. Log keys and JSON are not here: they are English, for programs.
"""

from __future__ import annotations

import locale
import os
import sys
import unicodedata

# code -> (English, Chinese). Both are str.format templates with the same fields (a test compares them).
MESSAGES: dict[str, tuple[str, str]] = {
    # --- edge of the programs
    "error": ("error [{code}]: {text}", "错误 [{code}]：{text}"),
    "fault": (
        "internal fault: {text}. This is a bug in cllm, not in your input; please report it with the traceback above.",
        "内部故障：{text}。这是 cllm 的缺陷，不是您的输入有误；请附上面的堆栈报告。",
    ),
    "usage.program": (
        "no program named '{name}'; choose one of: {programs}",
        "没有名为 '{name}' 的程序；可选：{programs}",
    ),
    # --- config
    "config.unreadable": (
        "cannot read the config {path}: {detail}. Copy cllm.toml from the project, or start from `preset:NAME`",
        "无法读取配置文件 {path}：{detail}。请从项目复制 cllm.toml，或使用 preset:名称",
    ),
    "config.syntax": ("{path} is not valid TOML: {detail}", "{path} 不是合法的 TOML：{detail}"),
    "config.preset": ("there is no preset '{name}'; known: {known}", "没有名为 '{name}' 的预设；可用：{known}"),
    "config.invalid": (
        "{count} mistake(s) in the configuration:\n  {problems}",
        "配置中有 {count} 处错误：\n  {problems}",
    ),
    "config.unknown": ("{where}: unknown key {key}; {hint}", "{where}：未知的键 {key}；{hint}"),
    "config.nearest": ("did you mean '{name}'?", "您是不是想写 '{name}'？"),
    "config.known": ("known here: {names}", "此处可用：{names}"),
    "config.type": (
        "{where}: {key} must be {expected}, found {found}",
        "{where}：{key} 应为 {expected}，实际是 {found}",
    ),
    "config.range": ("{where}: {key} = {value} is outside {bounds}", "{where}：{key} = {value} 超出范围 {bounds}"),
    "config.override": ("'{text}' is no override; write section.key=value", "'{text}' 不是有效的覆盖项；请写 节.键=值"),
    "config.row": (
        "{where}: train.tokens_per_step must be at least train.row_tokens ({row})",
        "{where}：train.tokens_per_step 至少要等于 train.row_tokens（{row}）",
    ),
    # --- data
    "data.empty": (
        "{path} has no usable conversation (rejected: {rejects}); look at it with python -m cllm.check {path}",
        "{path} 中没有可用的对话（拒绝：{rejects}）；请用 python -m cllm.check {path} 查看",
    ),
    "data.missing_file": (
        "there is no data file '{path}'; looked in {directory}. Check [data] in the config, or give the full path",
        "找不到数据文件 '{path}'（查找位置：{directory}）。请检查配置中的 [data]，或写出完整路径",
    ),
    "data.empty_directory": (
        "the directory '{path}' holds no data file (.json .jsonl .csv .tsv .parquet, or .gz of them)",
        "目录 '{path}' 中没有数据文件（.json .jsonl .csv .tsv .parquet，或其 .gz）",
    ),
    "data.unreadable_file": (
        "the data file '{path}' cannot be read: {cause}. Check that it is a file and that you may read it",
        "无法读取数据文件 '{path}'：{cause}。请确认它是文件且有读取权限",
    ),
    "data.parquet": (
        "'{path}' is a Parquet file; install pyarrow to read it (pip install pyarrow), or export it as JSON Lines",
        "'{path}' 是 Parquet 文件；请安装 pyarrow（pip install pyarrow），或导出为 JSON Lines",
    ),
    "data.opencc": (
        "the conversion '{convert}' needs OpenCC: pip install opencc",
        "转换 '{convert}' 需要 OpenCC：pip install opencc",
    ),
    "data.columns_unknown": (
        "[data.columns] has unknown keys: {keys}; known are {known}",
        "[data.columns] 中有未知的键：{keys}；可用的键：{known}",
    ),
    "data.columns_half": (
        "[data.columns] names only the {have} column; name both user and assistant",
        "[data.columns] 只写了 {have} 列；user 与 assistant 两列都要写",
    ),
    "data.no_rows": (
        "'{file}' holds no rows: it is empty, [] or a header alone",
        "'{file}' 中没有数据行：文件为空、为 [] 或只有表头",
    ),
    "data.encoding": (
        "'{file}' is not UTF-8; reading it as {encoding}",
        "'{file}' 不是 UTF-8；按 {encoding} 读取",
    ),
    # --- model
    "nf4.plain": (
        "bitsandbytes cannot be used here ({reason}); NF4 runs on plain PyTorch: same results, more time per step",
        "此处无法使用 bitsandbytes（{reason}）；NF4 改用纯 PyTorch 计算：结果相同，每步稍慢",
    ),
    "lora.targets": (
        '[lora] targets: {missing} matches no linear layer of this model; it has: {known} (or use targets = "all-linear")',
        '[lora] targets：{missing} 在该模型中没有匹配的线性层；可用：{known}（或写 targets = "all-linear"）',
    ),
    "adapter.damaged": (
        "{path} is not a readable LoRA adapter ({detail}); point to the `adapter` folder of a run, or copy it again",
        "{path} 不是可读取的 LoRA 适配器（{detail}）；请指向某次运行的 adapter 目录，或重新复制",
    ),
    "adapter.mismatch": (
        "the adapter in {path} does not fit this base model ({count} problems): {problems}. Load it on the base it was trained on",
        "{path} 中的适配器与该基座模型不符（{count} 处）：{problems}。请使用训练它时的基座模型",
    ),
    "source.not_found": (
        "no model '{name}': it is no existing directory or .gguf file, not built in ({built_in}), and no hub name like Qwen/Qwen3-0.6B",
        "找不到模型 '{name}'：既不是已存在的目录或 .gguf 文件，也不是内置模型（{built_in}）或形如 Qwen/Qwen3-0.6B 的模型库名称",
    ),
    "source.failed": ("{host} could not serve {name}: {detail}", "{host} 无法提供 {name}：{detail}"),
    "source.fetch": (
        "fetching {name} from {host}: {count} files, {gib} GiB, to {path}",
        "正在从 {host} 获取 {name}：{count} 个文件，{gib} GiB，保存到 {path}",
    ),
    "source.unreachable": (
        "no hub could serve {name} ({failures}). Three ways round it: give the path of a local copy; write modelscope:{name}; "
        "or set HF_ENDPOINT to a mirror, e.g. HF_ENDPOINT=https://hf-mirror.com",
        "没有模型库能提供 {name}（{failures}）。三种办法：填写本地副本的路径；写成 modelscope:{name}；"
        "或将 HF_ENDPOINT 设为镜像，例如 HF_ENDPOINT=https://hf-mirror.com",
    ),
    "model.exists": ("{path} exists and is not overwritten; name a new directory", "{path} 已存在，不会被覆盖；请指定新的目录"),
    "model.no_config": (
        "{path} holds no config.json: [model] path takes a checkpoint directory (config.json + weights), a .gguf file or a hub name",
        "{path} 中没有 config.json：[model] path 应为检查点目录（config.json 与权重）、.gguf 文件或模型库名称",
    ),
    "model.no_weights": (
        "{path} holds no weights: expected model.safetensors or pytorch_model.bin, or their .index.json with all shards",
        "{path} 中没有权重：应有 model.safetensors 或 pytorch_model.bin，或其 .index.json 与全部分片",
    ),
    "model.unsupported": (
        "{path}: architecture {architecture} is not supported (its remote code is never run). Supported originals: {supported}; "
        "and every causal language model that Transformers has natively",
        "{path}：不支持架构 {architecture}（绝不执行远程代码）。支持的原始检查点：{supported}；以及 Transformers 原生的所有因果语言模型",
    ),
    "model.quantized": (
        '{path} is already quantized ({method}); use the original 16-bit checkpoint and quantize = "nf4"',
        '{path} 已被量化（{method}）；请使用原始 16 位检查点并设置 quantize = "nf4"',
    ),
    "model.config_missing": (
        "config.json is no {family} configuration that is understood: {keys} missing. Download config.json again",
        "config.json 不是可识别的 {family} 配置：缺少 {keys}。请重新下载 config.json",
    ),
    "model.config_refused": (
        "this {family} variant is not supported: {settings}. Use the published 16-bit checkpoint of the family",
        "不支持该 {family} 变体：{settings}。请使用该系列发布的 16 位检查点",
    ),
    "model.shard_name": (
        "{path}: shard names may be plain file names only, found {names}; do not trust this checkpoint, download it again",
        "{path}：分片名只能是纯文件名，却发现 {names}；请勿信任该检查点，并重新下载",
    ),
    "model.shard_missing": (
        "{path}: shards missing: {names}. The download is incomplete; run it again, it resumes",
        "{path}：缺少分片：{names}。下载不完整；请重新运行，将从断点续传",
    ),
    "model.truncated": (
        "{path} is cut short: tensor {tensor} ends beyond the end of the file. The download is incomplete; fetch this file again",
        "{path} 不完整：张量 {tensor} 超出文件末尾。下载未完成；请重新获取该文件",
    ),
    "model.damaged": (
        "{path} is damaged ({detail}); fetch this file again",
        "{path} 已损坏（{detail}）；请重新获取该文件",
    ),
    "model.bin_old": (
        "{path} is no zip-format .bin (PyTorch before 1.6, or not a weight file). Convert it once where you trust it: "
        'torch.save(torch.load(FILE, map_location="cpu", weights_only=True), FILE)',
        "{path} 不是 zip 格式的 .bin（PyTorch 1.6 之前的格式，或并非权重文件）。请在可信环境中转换一次："
        'torch.save(torch.load(FILE, map_location="cpu", weights_only=True), FILE)',
    ),
    "model.bin_code": (
        "{path} is a pickle that wants to run code, and was refused; use a checkpoint in safetensors format",
        "{path} 是会执行代码的 pickle，已拒绝加载；请使用 safetensors 格式的检查点",
    ),
    "model.tensors": (
        "{path}: the weights do not fit config.json ({count} problems): {problems}. Download config.json and weights of one release",
        "{path}：权重与 config.json 不符（{count} 处）：{problems}。请下载同一版本的 config.json 与权重",
    ),
    "tokenizer.missing": (
        "no tokenizer in {path}: expected tokenizer.json, tokenizer.model, qwen.tiktoken, or vocab.json with merges.txt; "
        "copy the tokenizer files of the model there",
        "{path} 中没有分词器：应有 tokenizer.json、tokenizer.model、qwen.tiktoken，或 vocab.json 与 merges.txt；请把该模型的分词器文件复制到此处",
    ),
    "tokenizer.damaged": (
        "{path} cannot be read ({detail}); copy or download this file again",
        "无法读取 {path}（{detail}）；请重新复制或下载该文件",
    ),
    "tokenizer.gguf": (
        "the GGUF file's tokenizer (model '{model}', pre '{pre}') is not known; known: {known}. Use the original model directory",
        "不认识该 GGUF 文件的分词器（model '{model}'，pre '{pre}'）；已知：{known}。请改用原始模型目录",
    ),
    "tokenizer.template": (
        "no template '{name}'; choose auto or one of: {known}",
        "没有名为 '{name}' 的对话模板；可选 auto 或：{known}",
    ),
    "tokenizer.native": (
        "the model's own chat_template refuses this conversation: {detail}. Set [model] template to one of cllm's, e.g. chatml",
        "模型自带的 chat_template 拒绝该对话：{detail}。请把 [model] template 设为 cllm 的模板之一，例如 chatml",
    ),
    "tokenizer.prefix": (
        "the model's own chat_template changes earlier text when a turn is added, so what is trained would differ from what chat "
        "sends; set [model] template to one of cllm's, e.g. chatml",
        "模型自带的 chat_template 会在新增一轮时改动之前的文本，训练内容将与对话时不一致；请把 [model] template 设为 cllm 的模板之一，例如 chatml",
    ),
    "tokenizer.no_end": (
        "the vocabulary has no token that ends an answer ({token}; template {template}); set eos_token in tokenizer_config.json",
        "词表中没有结束回答的标记（{token}；模板 {template}）；请在 tokenizer_config.json 中设置 eos_token",
    ),
    # --- learn
    "log.tracker": (
        '[log] tracker = "{name}" needs its package: pip install {name}',
        '[log] tracker = "{name}" 需要安装对应的包：pip install {name}',
    ),
    "snapshot.torn": ("snapshot {path} is damaged ({detail}); it is skipped", "快照 {path} 已损坏（{detail}），跳过"),
    "snapshot.none": (
        "no usable snapshot in {path}; start the run without --resume",
        "{path} 中没有可用的快照；请不带 --resume 重新开始",
    ),
    "snapshot.unsaved": (
        "snapshot at step {step} could not be written ({detail}); earlier ones stay and the run goes on",
        "第 {step} 步的快照无法写入（{detail}）；之前的快照仍保留，训练继续",
    ),
    "run.none": (
        "there is no finished run under {root}; start one with: python -m cllm.train cllm.toml",
        "{root} 下没有已完成的运行；请先执行：python -m cllm.train cllm.toml",
    ),
    # --- serve
    "run.no_adapter": (
        "{run} has no adapter yet: let the training finish, or give the base model's name instead",
        "{run} 尚无适配器：请等训练完成，或改为给出基座模型的名称",
    ),
    "adapter.no_base": (
        "{path} does not name its base model: set base_model_name_or_path in it to a path or a hub name",
        "{path} 未写明基座模型：请在其中把 base_model_name_or_path 设为路径或模型名",
    ),
    "serve.sampling": ("sampling parameters out of range: {problems}", "采样参数超出范围：{problems}"),
    "serve.empty": ("the prompt is empty: send at least one token", "提示为空：请至少输入一个词元"),
    "serve.context": (
        "the prompt has {tokens} tokens and the limit for prompt and answer together is {limit}: shorten or reset the conversation",
        "提示有 {tokens} 个词元，而提示与回答合计上限为 {limit}：请缩短或清空对话",
    ),
    "serve.stateful": (
        "{architecture} keeps recurrent state: requests run one after the other",
        "{architecture} 含循环状态：请求将逐个运行",
    ),
    "serve.memory": (
        "out of memory while decoding: the budget is now {tokens} tokens and the requests go on",
        "解码时内存不足：预算降为 {tokens} 个词元，请求继续进行",
    ),
    "serve.too_long_for_memory": (
        "not enough memory for a conversation of {tokens} tokens: shorten it or free memory",
        "内存不足以容纳 {tokens} 个词元的对话：请缩短对话或释放内存",
    ),
    "serve.failed": ("the model failed on this request: {detail}", "模型处理此请求时失败：{detail}"),
    "serve.not_finite": (
        "the model's output is not finite: try bf16 or float32 instead of fp16, or a shorter prompt",
        "模型输出出现非有限值：请改用 bf16 或 float32 代替 fp16，或缩短提示",
    ),
    "serve.host": (
        "Host {host} is not this machine: use http://127.0.0.1, or start with --host to serve others",
        "主机名 {host} 不是本机：请使用 http://127.0.0.1，或用 --host 启动以供他人访问",
    ),
    "serve.origin": ("requests from other sites ({origin}) are refused", "拒绝来自其他网站（{origin}）的请求"),
    "serve.key": (
        "wrong or missing key: open the address that the server printed, or send Authorization: Bearer KEY",
        "密钥缺失或错误：请打开服务器启动时打印的地址，或发送 Authorization: Bearer KEY",
    ),
    "serve.json": ("Content-Type must be application/json", "Content-Type 必须为 application/json"),
    "serve.body": ("the request is larger than {limit} KiB", "请求超过 {limit} KiB"),
    "serve.model": ("there is no model '{name}'; choose one of: {known}", "没有名为 '{name}' 的模型；可选：{known}"),
    "serve.unsupported": ("not supported: {fields}", "不支持：{fields}"),
    "serve.busy": ("too many requests are waiting; try again in a few seconds", "排队的请求过多；请几秒后再试"),
    # --- train
    "train.help": ("Fine-tune a model with LoRA as a TOML file says.", "按 TOML 配置文件用 LoRA 微调模型。"),
    "train.help.config": ("a TOML file, or preset:NAME", "TOML 配置文件，或 preset:名称"),
    "train.help.overrides": ("settings that replace the file's", "覆盖配置文件中的设置"),
    "train.help.resume": ("go on with the newest run of this config", "从该配置最近一次运行继续"),
    "train.help.accept_rejects": ("train although many rows were rejected", "即使大量数据行被拒绝也继续训练"),
    "train.help.allow_changes": ("resume although settings, data or base changed", "即使设置、数据或基座有变化也继续"),
    "train.data": (
        "data: {train} to train on ({tokens} tokens in {rows} packed rows), {held_out} held out; rejected {rejects}, left out {left_out}",
        "数据：训练 {train} 条（{tokens} 个词元，打包成 {rows} 行），留出 {held_out} 条；拒绝 {rejects}，舍弃 {left_out}",
    ),
    "train.model": (
        "{name} · {precision} · {device} · LoRA r={rank} on {linears} linears · {millions}M trainable ({share})",
        "{name} · {precision} · {device} · LoRA r={rank}，{linears} 个线性层 · 可训练 {millions}M（{share}）",
    ),
    "train.rejects": (
        "{share} of the rows were rejected ({count}), more than 20 %: {examples}\n  Mend them (python -m cllm.check FILE shows all), map "
        "the columns in [data.columns], or add --accept-rejects",
        "{share} 的数据行被拒绝（{count} 行），超过 20 %：{examples}\n  请修正（python -m cllm.check 文件 可查看全部）、在 "
        "[data.columns] 中映射列名，或加上 --accept-rejects",
    ),
    "train.unsupervised": (
        "none of the {count} conversations has a token to train on with the template '{template}' in rows of {row} tokens; look at them "
        "with python -m cllm.check",
        "{count} 段对话在模板 '{template}'、每行 {row} 词元下没有任何可训练的词元；请用 python -m cllm.check 查看",
    ),
    "train.too_long": (
        "all {count} conversations are longer than a row of {row} tokens (template '{template}'); raise train.row_tokens or set "
        'data.truncate = "prompt"',
        "全部 {count} 段对话都超过一行的 {row} 个词元（模板 '{template}'）；请增大 train.row_tokens 或设 data.truncate = \"prompt\"",
    ),
    "train.no_end": (
        "the end token of template '{template}' is never trained, so the model would never stop; choose another model.template",
        "模板 '{template}' 的结束词元从未被训练，模型将不会停止；请更换 model.template",
    ),
    "train.changed": (
        "{run} was started with other settings: {changes}. Undo them, start a new run without --resume, or add --allow-changes",
        "{run} 的设置与现在不同：{changes}。请改回、不带 --resume 重新开始，或加上 --allow-changes",
    ),
    "train.resumed": ("resuming {run} after step {step} of {total}", "从 {run} 的第 {step}/{total} 步继续"),
    "train.end_token": (
        "this base model never trained {before}, so it would not learn to stop; {after} ends an answer instead, in training and in chat",
        "该基座模型从未训练过 {before}，将学不会停止；训练与对话中改用 {after} 结束回答",
    ),
    "train.eval": (
        "eval  step {step}: held-out loss {loss}\n      Q: {question}\n      A: {answer}\n      reference: {reference}",
        "评估  第 {step} 步：留出集损失 {loss}\n      问：{question}\n      答：{answer}\n      参考：{reference}",
    ),
    "train.eval_loss": ("eval  step {step}: held-out loss {loss}", "评估  第 {step} 步：留出集损失 {loss}"),
    "train.early": (
        "stopped early at step {step}: {patience} evaluations without a lower held-out loss",
        "第 {step} 步提前停止：连续 {patience} 次评估的留出集损失没有下降",
    ),
    "train.stopping": ("stopping after this step (once more: at once)", "本步结束后停止（再按一次立即停止）"),
    "train.interrupted": (
        "stopped and saved at step {step} of {total}; go on with: {command}",
        "已在第 {step}/{total} 步停止并保存；继续训练：{command}",
    ),
    "train.nonfinite": (
        "step {step}: loss or gradient is not finite ({bad} in a row, {precision}); first at: {module}. Lower train.learning_rate, or set "
        'model.precision = "fp32" (or bf16); earlier snapshots and the best adapter are kept',
        "第 {step} 步：损失或梯度不是有限值（连续 {bad} 次，{precision}）；最先出现于：{module}。请降低 train.learning_rate，或设 "
        'model.precision = "fp32"（或 bf16）；之前的快照与最佳适配器均已保留',
    ),
    "train.zero_loss": (
        "step {step}: the loss is exactly 0, so nothing is learned; look at the labels with python -m cllm.check",
        "第 {step} 步：损失恰好为 0，说明没有学到任何东西；请用 python -m cllm.check 查看标签",
    ),
    "train.answering": ("answering {count} held-out questions …", "正在回答 {count} 个留出问题……"),
    "train.done": (
        "\nresults are in {run}; talk to the model with: python -m cllm.chat {run}",
        "\n结果保存在 {run}；与模型对话：python -m cllm.chat {run}",
    ),
    # --- eval
    "eval.help": (
        "Answer the questions of a file with a run (base and adapter) or a model, and score the answers.",
        "用某次运行（基座与适配器）或某个模型回答文件中的问题并打分。",
    ),
    "eval.help.model": ("a run directory, or a model as in [model] path", "运行目录，或与 [model] path 相同写法的模型"),
    "eval.help.data": ("file with questions and reference answers; may be repeated", "含问题与参考答案的文件；可重复"),
    "eval.help.columns": ("column map if the file needs one", "需要时的列映射"),
    "eval.help.base": ("the base only, without the run's adapter", "只评估基座，不用适配器"),
    "eval.help.limit": ("only the first N conversations", "只取前 N 段对话"),
    "eval.help.shots": ("also give the base N training examples in the prompt", "另外在提示中给基座 N 个训练样例"),
    "eval.empty": (
        "{path} has no conversation that ends with an answer ({rejects} rows rejected); see python -m cllm.check {path}",
        "{path} 中没有以回答结尾的对话（拒绝了 {rejects} 行）；请查看 python -m cllm.check {path}",
    ),
    "eval.start": ("{path}: answering {count} questions", "{path}：回答 {count} 个问题"),
    "eval.progress": ("{done}/{total} answers, eta {eta}", "已回答 {done}/{total}，剩余 {eta}"),
    "eval.by_category": ("exact match, %", "完全匹配 %"),
    "eval.written": ("eval.json and samples.jsonl are in {path}", "eval.json 与 samples.jsonl 保存在 {path}"),
    "ui.chat": ("Chat", "对话"),
    "ui.compare": ("Compare", "对比"),
    "ui.training": ("Training", "训练"),
    "ui.monitor": ("Monitor", "监控"),
    "ui.hello": ("Ask something", "请提问"),
    "ui.ask": ("Message … (Enter sends, Shift+Enter breaks the line)", "输入消息……（回车发送，Shift+回车换行）"),
    "ui.settings": ("Settings", "设置"),
    "ui.system": ("System prompt", "系统提示"),
    "ui.max_tokens": ("longest answer (tokens)", "最长回答（词元）"),
    "ui.temperature": ("temperature", "温度"),
    "ui.penalty": ("repetition penalty", "重复惩罚"),
    "ui.compare_ask": ("One question to both models; which is which is told after your vote", "同一问题由两个模型回答；投票后揭晓"),
    "ui.vote_a": ("A is better", "A 更好"),
    "ui.vote_b": ("B is better", "B 更好"),
    "ui.vote_tie": ("Both good", "一样好"),
    "ui.vote_bad": ("Both bad", "都不好"),
    "ui.votes_kept": (
        "Votes are kept with question and answers in the run's votes.jsonl, as preference data.",
        "投票连同问题与回答保存在该运行的 votes.jsonl 中，可作偏好数据。",
    ),
    "ui.run": ("Run", "运行"),
    "ui.loss": ("Loss", "损失"),
    "ui.speed": ("Tokens per second", "每秒词元数"),
    "ui.scores": ("Scores before and after", "训练前后得分"),
    "ui.samples": ("Samples", "样例"),
    "ui.running": ("answers running", "正在回答"),
    "ui.waiting": ("waiting", "排队"),
    "ui.speed_now": ("speed", "速度"),
    "ui.kv_cache": ("KV cache (tokens)", "KV 缓存（词元）"),
    "ui.gpu_memory": ("GPU memory", "显存"),
    "ui.gpu_load": ("GPU load", "GPU 利用率"),
    "ui.memory": ("peak memory of the process", "进程内存峰值"),
    "ui.cpu_load": ("CPU load (1 min)", "CPU 负载（1 分钟）"),
    "ui.seed": ("seed (empty: random)", "随机种子（空：随机）"),
    # --- chat
    "chat.help": (
        "talk to a run or a model: web page and OpenAI-compatible API on one port, or in the terminal",
        "与一次运行或模型对话：网页与 OpenAI 兼容 API 共用一个端口，或在终端中",
    ),
    "chat.help.model": (
        "run directory, adapter directory, model path or name; default: the newest run",
        "运行目录、适配器目录、模型路径或名称；默认：最新的运行",
    ),
    "chat.help.terminal": ("talk in the terminal instead", "改为在终端中对话"),
    "chat.help.host": (
        "address to listen on; 0.0.0.0: reachable by others, guarded by a key (CLLM_KEY, or a random one)",
        "监听地址；0.0.0.0：可供他人访问，由密钥保护（CLLM_KEY，或随机生成）",
    ),
    "chat.help.port": ("port (default 7860)", "端口（默认 7860）"),
    "chat.loading": ("loading {model} …", "正在载入 {model} …"),
    "chat.serving": ("open {url}   (API: {api})   Ctrl-C ends", "请打开 {url}  （API：{api}）  Ctrl-C 结束"),
    "chat.hello": (
        "{model} listens. /system TEXT, /base, /adapter, /reset, /save FILE, /quit; Ctrl-C stops an answer",
        "{model} 已就绪。/system 文本，/base，/adapter，/reset，/save 文件，/quit；Ctrl-C 中止回答",
    ),
    "chat.commands": (
        "commands: /system TEXT, /base, /adapter, /reset, /save FILE, /quit",
        "命令：/system 文本，/base，/adapter，/reset，/save 文件，/quit",
    ),
    "chat.no_adapter": ("{model} was opened without an adapter: give a run instead", "{model} 没有适配器：请改为打开一次运行"),
    "chat.now": ("now talking to {model}", "现在与 {model} 对话"),
    "chat.fresh": ("new conversation, system prompt: {system}", "新对话，系统提示：{system}"),
    "chat.saved": ("appended to {path}", "已追加到 {path}"),
    "chat.cost": ("[{tokens} tokens, first after {first} s, {speed} tok/s]", "[{tokens} 个词元，首词元 {first} 秒，{speed} 词元/秒]"),
    # --- check
    "check.help": ("what the data is, and what will be trained on, token by token", "数据是什么样的，哪些词元会参与训练"),
    "check.help.target": ("a config, preset:NAME, a data file, a folder or demo", "配置文件、preset:名称、数据文件、目录或 demo"),
    "check.help.overrides": ("settings as section.key=value, such as model.path=DIR", "以 小节.键=值 形式覆盖设置，例如 model.path=目录"),
    "check.help.init": ("write a commented config for this data", "为这份数据写一个带注释的配置"),
    "check.help.write": ("write the cleaned conversations as JSON Lines", "把清洗后的对话写成 JSON Lines"),
    "check.help.report": ("write one self-contained HTML page, and lengths.png beside it", "写出一个独立的 HTML 页面，旁边附 lengths.png"),
    "check.exists": ("{path} exists already; name a new file", "{path} 已存在；请换一个文件名"),
    "check.rows": ("{rows} rows: {valid} valid, {rejected} rejected", "{rows} 行：有效 {valid}，拒绝 {rejected}"),
    "check.reject": ("{file}:{line}: {reason}: {detail}; {mend}", "{file}:{line}：{reason}：{detail}；{mend}"),
    "check.more": ("… and {count} more with {reason}", "……另有 {count} 行 {reason}"),
    "check.duplicates": ("duplicates: {exact} exact, {near} near", "重复：完全相同 {exact}，近似 {near}"),
    "check.languages": ("languages: {counts}", "语言：{counts}"),
    "check.boilerplate": ("answers that refuse or say they are an AI: {count}", "拒答或自称 AI 的回答：{count}"),
    "check.personal": ("personal data: {counts}", "个人信息：{counts}"),
    "check.leaks": ("{count} held-out questions are in the training set too, or nearly", "{count} 个留出问题也（或几乎）在训练集中"),
    "check.lengths": ("{unit} per conversation: {numbers}", "每个对话的{unit}：{numbers}"),
    "check.characters": ("characters", "字符数"),
    "check.tokens": ("tokens", "词元数"),
    "check.over": ("{count} are longer than train.row_tokens = {limit}", "{count} 个超过 train.row_tokens = {limit}"),
    "check.sample": ("{file}:{line}: {supervised} of {tokens} tokens are trained (green, or ⟦…⟧)", "{file}:{line}：{tokens} 个词元中训练 {supervised} 个（绿色或 ⟦…⟧）"),
    "check.no_end": ("the end token is not trained: answers would not stop. Check model.template", "结束词元未参与训练：回答将不会停止。请检查 model.template"),
    "check.no_tokens": ("tokens are not counted, the model is not on this machine: {detail}", "未统计词元，因为模型不在本机：{detail}"),
    "check.wrote": ("wrote {path}", "已写出 {path}"),
    "check.mend.empty_user": ("give it a question or remove the row", "补上问题或删除该行"),
    "check.mend.empty_assistant": ("give it an answer or remove the row", "补上回答或删除该行"),
    "check.mend.no_assistant": ("add the answer, or map its column in [data.columns]", "补上回答，或在 [data.columns] 中指明其列"),
    "check.mend.empty_turn": ("fill in the turn or remove it with its partner", "补全该轮，或连同对应的一轮删除"),
    "check.mend.role_order": ("let user and assistant alternate, the user first", "让 user 与 assistant 交替，user 在先"),
    "check.mend.unknown_role": ("rename the role", "改用已知的角色名"),
    "check.mend.unknown_schema": ("name the columns in [data.columns] (--init suggests them)", "在 [data.columns] 中指明各列（--init 会给出建议）"),
    "check.mend.not_an_object": ("write each row as {{\"instruction\": …, \"output\": …}}", "每行写成 {{\"instruction\": …, \"output\": …}}"),
    "check.mend.parse_error": ("mend the line, or export the file again", "修正该行，或重新导出文件"),
    "check.mend.decode_error": ("save the file as UTF-8, or download it again", "将文件另存为 UTF-8，或重新下载"),
    "check.mend.invalid_text": ("replace the value by text", "把该值换成文本"),
    "check.mend.negative_label": ("nothing to mend: such answers are for preference training", "无需修正：这类回答用于偏好训练"),
    # --- bench, memory
    # --- export
}


def language() -> str:
    """`zh` or `en`: `CLLM_LANG` if set, else whether the locale (LC_ALL, LC_MESSAGES, LANG, Windows' setting) is Chinese."""
    chosen = os.environ.get("CLLM_LANG") or next(
        (os.environ[key] for key in ("LC_ALL", "LC_MESSAGES", "LANG") if os.environ.get(key)),
        locale.getlocale()[0] or "",
    )
    return "zh" if chosen.lower().startswith(("zh", "chinese")) else "en"


def say(code: str, /, **values: object) -> str:
    """The message `code` in the user's language with its fields filled in. Raises KeyError for an unknown code."""
    return MESSAGES[code][language() == "zh"].format(**values)


def note(code: str, /, **values: object) -> None:
    """Print the message `code` to stderr, where progress and status go."""
    print(say(code, **values), file=sys.stderr, flush=True)


def table(rows: list[list[str]]) -> str:
    """Left-aligned first column, right-aligned others; full-width characters count two columns."""

    def width(text: str) -> int:
        return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)

    columns = [max(width(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = []
    for row in rows:
        cells = [" " * (columns[i] - width(cell)) for i, cell in enumerate(row)]
        padded.append(
            "  ".join(c + s if i == 0 else s + c for i, (c, s) in enumerate(zip(row, cells, strict=True))).rstrip()
        )
    return "\n".join(padded)


class UserError(Exception):
    """The user's mistake or circumstance: what, where and how to mend it, in one line. Programs print it and exit with 2."""

    def __init__(self, code: str, /, **values: object) -> None:
        super().__init__(say(code, **values))
        self.code = code

    def __str__(self) -> str:
        return say("error", code=self.code, text=self.args[0])
