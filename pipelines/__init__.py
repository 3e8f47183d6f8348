"""The pipeline around the method: the only home of Prefect, Ray and MLflow."""
