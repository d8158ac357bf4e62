"""What a card calls the fields of a run's settings; of a field that is not here it says nothing.

{label: settings[name] for name, label in HYPERPARAMETERS.items() if name in settings}
"""

# Fields of a run's settings in the order in which a card shows them, and what it calls them.
HYPERPARAMETERS = {
    "learning_rate": "peak learning rate",
    "final_learning_rate": "final learning rate, as a share of the peak",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warm-up steps (below 1: a share)",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "rows_per_step": "rows a step",
    "completions_per_step": "completions a step",
    "num_generations": "completions of a prompt",
    "seq_length": "tokens of a row",
    "max_length": "tokens of a row",
    "max_completion_length": "tokens of a completion, at most",
    "optim": "optimizer",
    "adam_beta1": "Adam, beta 1",
    "adam_beta2": "Adam, beta 2",
    "adam_epsilon": "Adam, epsilon",
    "weight_decay": "weight decay",
    "max_grad_norm": "gradients clipped at",
    "beta": "KL coefficient",
    "loss_type": "loss",
    "mixed_precision": "mixed precision",
    "bf16": "bf16",
    "seed": "seed",
}
DISTILLATION = {"temperature": "temperature", "alpha": "share of the divergence in the loss"}
RESAMPLING = {
    "resample_every": "steps between two rounds",
    "resample_at_start": "a round before the first step",
    "curvature": "curvature",
    "reject": "rejected",
    "reject_rule": "whose influence counts",
    "reweigh": "sources weighed anew",
    "candidates_per_source": "rows of a source that a round scores",
}
