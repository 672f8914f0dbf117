"""sagemaker-mlflow-proxy: any MLflow call over plain HTTPS, signed with AWS IAM and forwarded to SageMaker MLflow."""

__version__ = "0.1.0"
