#include "../lowrank.cu"
