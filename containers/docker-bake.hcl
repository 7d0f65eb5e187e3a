# Every image, its base and its tag. From the repository's root:
#   toolkit containers build [NAME...]                      with plain docker or podman
#   docker buildx bake -f containers/docker-bake.hcl NAME   where buildx is
# A variable is overridden by an environment variable of its name.

variable "TOOLKIT_VERSION" { default = "0.1.0" }
variable "TOOLKIT_REVISION" { default = "unknown" }
variable "TOOLKIT_NGC" { default = "nvcr.io/nvidia" }
variable "TOOLKIT_PYTHON" { default = "docker.io/library/python:3.11-slim" }
variable "TOOLKIT_TRAIN" { default = "nvcr.io/nvidia/pytorch:26.09-py3" }
variable "TOOLKIT_TORCH_INDEX" { default = "" }
variable "TOOLKIT_NETWORK" { default = "default" }

group "default" {
  targets = [
    "toolkit", "agent", "train", "engine-26.05", "engine-25.08", "jetson-r8.5.2", "jetson-r8.6.2", "jetson-r10.3.0",
  ]
}

target "_common" {
  context = "."
  network = TOOLKIT_NETWORK
  labels = {
    "org.opencontainers.image.title"    = "edge-toolkit"
    "org.opencontainers.image.version"  = TOOLKIT_VERSION
    "org.opencontainers.image.revision" = TOOLKIT_REVISION
    "org.opencontainers.image.licenses" = "Apache-2.0"
  }
}

target "toolkit" {
  inherits   = ["_common"]
  dockerfile = "containers/cpu/Dockerfile"
  target     = "toolkit"
  args       = { BASE = TOOLKIT_PYTHON, TORCH_INDEX = TOOLKIT_TORCH_INDEX }
  tags       = ["edge-toolkit/toolkit:${TOOLKIT_VERSION}"]
  platforms  = ["linux/amd64", "linux/arm64"]
}

target "agent" {
  inherits   = ["_common"]
  dockerfile = "containers/cpu/Dockerfile"
  target     = "agent"
  args       = { BASE = TOOLKIT_PYTHON }
  tags       = ["edge-toolkit/agent:${TOOLKIT_VERSION}"]
  platforms  = ["linux/amd64", "linux/arm64"]
}

target "train" {
  inherits   = ["_common"]
  dockerfile = "containers/train/Dockerfile"
  args       = { BASE = TOOLKIT_TRAIN }
  tags       = ["edge-toolkit/train:${TOOLKIT_VERSION}"]
  platforms  = ["linux/amd64"]
}

# the last TensorRT 10 for x86 and SBSA arm64 (JetPack 7.2)
target "engine-26.05" {
  inherits   = ["_common"]
  dockerfile = "containers/engine/Dockerfile"
  args       = { BASE = "${TOOLKIT_NGC}/tensorrt:26.05-py3", CUDA = "13" }
  tags       = ["edge-toolkit/engine:${TOOLKIT_VERSION}-26.05"]
  platforms  = ["linux/amd64", "linux/arm64"]
}

# JetPack 7.0 and 7.1
target "engine-25.08" {
  inherits   = ["_common"]
  dockerfile = "containers/engine/Dockerfile"
  args       = { BASE = "${TOOLKIT_NGC}/tensorrt:25.08-py3", CUDA = "13" }
  tags       = ["edge-toolkit/engine:${TOOLKIT_VERSION}-25.08"]
  platforms  = ["linux/arm64"]
}

# JetPack 5.1: its CUDA 11.4 is older than any cuda-python that is still published, so trtexec measures there
target "jetson-r8.5.2" {
  inherits   = ["_common"]
  dockerfile = "containers/jetson/Dockerfile"
  args       = { BASE = "${TOOLKIT_NGC}/l4t-tensorrt:r8.5.2.2-devel", CUDA = "" }
  tags       = ["edge-toolkit/jetson:${TOOLKIT_VERSION}-r8.5.2"]
  platforms  = ["linux/arm64"]
}

# JetPack 6.0
target "jetson-r8.6.2" {
  inherits   = ["_common"]
  dockerfile = "containers/jetson/Dockerfile"
  args       = { BASE = "${TOOLKIT_NGC}/l4t-tensorrt:r8.6.2-devel", CUDA = "12" }
  tags       = ["edge-toolkit/jetson:${TOOLKIT_VERSION}-r8.6.2"]
  platforms  = ["linux/arm64"]
}

# JetPack 6.1 and 6.2
target "jetson-r10.3.0" {
  inherits   = ["_common"]
  dockerfile = "containers/jetson/Dockerfile"
  args       = { BASE = "${TOOLKIT_NGC}/l4t-tensorrt:r10.3.0-devel", CUDA = "12" }
  tags       = ["edge-toolkit/jetson:${TOOLKIT_VERSION}-r10.3.0"]
  platforms  = ["linux/arm64"]
}
