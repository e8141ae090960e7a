#include "../launch.h"

template bool hkdfast::launch_rows(const Task&, bool, generic::ForwardKL, const PlanRequest&, int, void*);
