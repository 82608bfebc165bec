/*-------------------------------------------------------------------------
 *
 * probe.h
 *	  Probes: background workers that measure a query's latency.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_PROBE_H
#define RM_PROBE_H

/*
 * Process id of the worker that runs this probe of the current database, 0 if
 * none does.  Read from the lock table, so it is true also after a crash.
 */
extern int	rm_probe_pid(int64 id);

#endif							/* RM_PROBE_H */
