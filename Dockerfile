# docker build -t puma . && docker run --rm -v "$PWD/demo:/demo" puma demo --out /demo
# With a GPU: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t puma . && docker run --gpus all ...
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src src
# torch in the version of constraints.txt from its own index, everything else in those versions from PyPI
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)" \
    && pip install --no-cache-dir --constraint constraints.txt '.[hub]'
WORKDIR /work
ENTRYPOINT ["puma"]
CMD ["demo", "--out", "/demo"]
