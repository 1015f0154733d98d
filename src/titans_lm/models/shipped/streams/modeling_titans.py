"""Opens this model with the package titans-lm, whose version must know the model's configuration.

    import titans_lm
    model, tokenizer = titans_lm.load(FOLDER)

After `import titans_lm`, `AutoModelForCausalLM.from_pretrained(FOLDER)` works too. A process that has not imported the
package finds it through this file with `trust_remote_code=True`.
"""

from titans_lm import (  # noqa: F401
    TitansConfig,
    TitansForCausalLM,
    TitansForSequenceClassification,
    TitansForTimeSeriesPrediction,
    TitansForTokenClassification,
    TitansModel,
    TitansTimeSeriesConfig,
)
