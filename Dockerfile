# docker build -t puma . && docker run --rm -v "$PWD/demo:/demo" puma demo --out /demo
# With a GPU: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t puma . && docker run --gpus all ...
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src src
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" torch && pip install --no-cache-dir .
WORKDIR /work
ENTRYPOINT ["puma"]
CMD ["demo", "--out", "/demo"]
