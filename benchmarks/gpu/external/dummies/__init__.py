"""Models for SGLang's ``SGLANG_EXTERNAL_MODEL_PACKAGE``."""
