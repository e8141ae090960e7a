#include "../launch.h"

template bool hkdfast::launch_rows(const Task&, bool, generic::Decode, const PlanRequest&, int, void*);
