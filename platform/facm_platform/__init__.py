"""The platform around `facm_core`: Ray Train, Ray Data, evaluation, MLflow tracking, registry."""
