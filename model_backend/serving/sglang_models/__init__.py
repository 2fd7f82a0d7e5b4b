"""Models for SGLang's ``SGLANG_EXTERNAL_MODEL_PACKAGE``; imported by SGLang's processes alone."""
