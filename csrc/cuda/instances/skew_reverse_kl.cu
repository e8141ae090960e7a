#include "../launch.h"

template bool hkdfast::launch_rows(const Task&, bool, generic::SkewReverseKL, const PlanRequest&, int, void*);
