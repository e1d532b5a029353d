#include "../lowrank_walk.cu"
