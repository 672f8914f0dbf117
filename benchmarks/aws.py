"""The names and the made-up credentials that every signing peer uses."""

REGION = "us-east-1"
SERVICE = "sagemaker-mlflow"
ARN = "arn:aws:sagemaker:us-east-1:111122223333:mlflow-tracking-server/bench"
ARN_HEADER = "x-mlflow-sm-tracking-server-arn"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
    "AWS_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
}
