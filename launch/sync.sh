set -eu
tree=$1; here=$(git rev-parse --show-toplevel); mkdir -p $here/.world; rm -rf $here/.world/tree $here/.world/launch; mkdir -p $here/.world/tree
cd $tree && tar cf - --exclude='./.[a-z]*' --exclude='demo/run*' --exclude='demo/weights/*' --exclude=__pycache__ --exclude=./docs --exclude=./workflows --exclude=./web --exclude=./locales --exclude=./tests --exclude=./subgraphs . | tar xf - -C $here/.world/tree
cp demo/weights/small_world_vision.safetensors demo/weights/small_world_probe.safetensors $here/.world/tree/demo/weights/
cp -r $here/.world/tree/launch $here/.world/launch; du -sh $here/.world
