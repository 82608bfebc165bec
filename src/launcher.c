/*-------------------------------------------------------------------------
 *
 * launcher.c
 *	  Goes on with migrations that were running in the background.
 *
 * Only with the library in shared_preload_libraries.  Without it nothing is
 * lost: rm_migrations says to call rm_resume().
 *
 *	launcher, in no database		at the start of the server (or its
 *		  |							promotion), then every launcher_interval,
 *		  |							and when the configuration is reloaded
 *		  |  for one database after the other
 *		  v
 *	scout, in a database			is the extension here?  whose runner has gone?
 *		  |  for each such migration
 *		  v
 *	runner (steer.c)				goes on, as the role that has started it
 *
 * A process can be connected to one database only, hence the scouts.  There is
 * one at a time, for milliseconds; templates and databases that allow no
 * connections are left alone.
 *
 * "Whose runner has gone": the migration is open, was last run in the
 * background, nobody holds its runner's lock, nobody wants it paused or
 * cancelled, it has a step left that runs by itself, and its last step did not
 * end with an error (that needs somebody to look at it).
 *
 * Easy to get wrong:
 *
 * - A migration that takes the server down with it (an expression that
 *	 crashes) would do so for ever.  After MAX_LAUNCHES in a row in which it got
 *	 no further it is left alone.
 *
 * - Trust.  A scout is a superuser, and what it reads decides who a runner is.
 *	 Anybody who may create a schema could make tables of these names, so they
 *	 count only if they belong to the extension; and as everywhere they are read
 *	 as their owner.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <limits.h>
#include <signal.h>

#include "access/genam.h"
#include "access/heapam.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/dependency.h"
#include "catalog/pg_class.h"
#include "catalog/pg_database.h"
#include "catalog/pg_type.h"
#include "commands/extension.h"
#include "compat.h"
#include "executor/spi.h"
#include "migration.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "risky_migrations.h"
#include "state.h"
#include "steer.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "tcop/tcopprot.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "worker.h"

/* starts of one migration in a row that brought it no further */
#define MAX_LAUNCHES 3

PGDLLEXPORT void rm_launcher_main(Datum main_arg);
PGDLLEXPORT void rm_scout_main(Datum main_arg);

/* a database that may have work */
typedef struct Database
{
	Oid			oid;
	char	   *name;
} Database;

/* registers the launcher, where the server is just starting */
void
rm_launcher_init(void)
{
	BackgroundWorker worker;

	if (!process_shared_preload_libraries_in_progress)
		return;
	memset(&worker, 0, sizeof(worker));
	strlcpy(worker.bgw_name, "risky_migrations launcher", BGW_MAXLEN);
	strlcpy(worker.bgw_type, "risky_migrations launcher", BGW_MAXLEN);
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = 10;
	strlcpy(worker.bgw_library_name, "risky_migrations", sizeof(worker.bgw_library_name));
	strlcpy(worker.bgw_function_name, "rm_launcher_main", BGW_MAXLEN);
	RegisterBackgroundWorker(&worker);
}

/*-------------------------------------------------------------------------
 * The launcher
 *-------------------------------------------------------------------------
 */

/* the databases that ordinary sessions can connect to, in current memory */
static List *
list_databases(void)
{
	MemoryContext cxt = CurrentMemoryContext;
	List	   *databases = NIL;
	Relation	rel;
	TableScanDesc scan;
	HeapTuple	tup;

	StartTransactionCommand();
	(void) GetTransactionSnapshot();
	rel = table_open(DatabaseRelationId, AccessShareLock);
	scan = table_beginscan_catalog(rel, 0, NULL);
	while ((tup = heap_getnext(scan, ForwardScanDirection)) != NULL)
	{
		Form_pg_database form = (Form_pg_database) GETSTRUCT(tup);
		MemoryContext oldcxt;
		Database   *db;

		/* datconnlimit -2: what a broken DROP DATABASE has left */
		if (form->datistemplate || !form->datallowconn || form->datconnlimit < -1)
			continue;
		oldcxt = MemoryContextSwitchTo(cxt);
		db = palloc(sizeof(Database));
		db->oid = form->oid;
		db->name = pstrdup(NameStr(form->datname));
		databases = lappend(databases, db);
		MemoryContextSwitchTo(oldcxt);
	}
	table_endscan(scan);
	table_close(rel, AccessShareLock);
	CommitTransactionCommand();
	MemoryContextSwitchTo(cxt);
	return databases;
}

/* sends a scout into each database, one after the other */
static void
send_scouts(void)
{
	ListCell   *lc;

	foreach(lc, list_databases())
	{
		Database   *db = lfirst(lc);
		BackgroundWorkerHandle *handle;

		CHECK_FOR_INTERRUPTS();
		handle = rm_worker_register(psprintf("risky_migrations scout in %s", db->name),
									"risky_migrations scout", "rm_scout_main",
									ObjectIdGetDatum(db->oid), NULL, 0, true, NULL);
		if (handle == NULL)
		{
			ereport(LOG,
					(errcode(ERRCODE_INSUFFICIENT_RESOURCES),
					 errmsg("no background worker is free to look for migrations that were interrupted"),
					 errdetail("max_worker_processes allows %d background workers, and all are in use.",
							   max_worker_processes),
					 errhint("It is tried again; or increase max_worker_processes.")));
			return;
		}
		if (WaitForBackgroundWorkerShutdown(handle) == BGWH_POSTMASTER_DIED)
			proc_exit(1);
	}
}

/* Entry point of the launcher. */
void
rm_launcher_main(Datum main_arg)
{
	MemoryContext cxt;
	uint32		wait_event;

	pqsignal(SIGTERM, die);
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnection(NULL, NULL, 0);
	cxt = AllocSetContextCreate(TopMemoryContext, "rm launcher", ALLOCSET_DEFAULT_SIZES);
	MemoryContextSwitchTo(cxt);
	wait_event = rm_wait_event("RiskyMigrationsLauncher");

	for (;;)
	{
		bool		told = false;
		int			rc;

		send_scouts();
		MemoryContextReset(cxt);
		do
		{
			/* waiting for a scout may have swallowed the wake-up of a reload */
			rc = WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						   ConfigReloadPending ? 0 : rm_launcher_interval * 1000L,
						   wait_event);
			ResetLatch(MyLatch);
			CHECK_FOR_INTERRUPTS();
			if (ConfigReloadPending)
			{
				ConfigReloadPending = false;
				ProcessConfigFile(PGC_SIGHUP);
				told = true;
			}
		} while (!told && !(rc & WL_TIMEOUT));
	}
}

/*-------------------------------------------------------------------------
 * The scout
 *-------------------------------------------------------------------------
 */

/* is the extension in this database, and is the state its own? */
static bool
extension_is_here(void)
{
	Oid			extension = get_extension_oid("risky_migrations", true);
	Oid			steering = rm_state_relid("steering", true);
	Oid			migration = rm_state_relid("migration", true);
	Oid			step_log = rm_state_relid("step_log", true);

	return OidIsValid(extension) && OidIsValid(steering) && OidIsValid(migration) &&
		OidIsValid(step_log) &&
		getExtensionOfObject(RelationRelationId, steering) == extension &&
		getExtensionOfObject(RelationRelationId, migration) == extension &&
		getExtensionOfObject(RelationRelationId, step_log) == extension;
}

/*
 * Counts one more start of the migration; false if it has been started often
 * enough without getting any further.  How far it is the state row says, and
 * where the pages are shared out, or there are several leaves, their rows.  Ranges
 * of the verification do not count, for each run begins with new ones.
 */
static bool
may_launch(int64 id)
{
	Oid			types[] = {INT8OID, INT8OID, INT8OID};
	Datum		v[] = {Int64GetDatum(id), Int64GetDatum(MAX_LAUNCHES), Int64GetDatum(RM_BACKFILL)};

	rm_state_execute("WITH now AS (SELECT pg_catalog.format('%s %s %s %s %s %s', m.steps_done, m.phase, m.next_block, m.rows_done,"
					 "  (SELECT count(*) FROM risky_migrations.leaf l WHERE l.migration_id = m.id AND l.done),"
					 "  (SELECT sum(r.next_block) FROM risky_migrations.range r WHERE r.migration_id = m.id AND m.steps_done = $3)) AS mark"
					 " FROM risky_migrations.migration m WHERE m.id = $1)"
					 " UPDATE risky_migrations.steering s SET launch_mark = n.mark,"
					 " launches = CASE WHEN s.launch_mark = n.mark THEN s.launches + 1 ELSE 1 END"
					 " FROM now n WHERE s.migration_id = $1"
					 " AND (s.launches < $2 OR s.launch_mark IS DISTINCT FROM n.mark)",
					 3, types, v, NULL);
	return SPI_processed > 0;
}

/* starts a runner for each migration that lacks one */
static void
launch_runners(void)
{
	int64	   *ids;
	Oid		   *roles;
	int			n;

	rm_state_execute("SELECT s.migration_id, s.session_role::int8, m.method,"
					 " m.steps_done::int8, s.cut_over = 'manual'"
					 " FROM risky_migrations.steering s"
					 " JOIN risky_migrations.migration m ON m.id = s.migration_id"
					 " WHERE m.state = 'open' AND s.background AND s.wanted = 'run'"
					 " AND coalesce((SELECT l.direction = 'apply' AND l.state <> 'failed'"
					 "   FROM risky_migrations.step_log l WHERE l.migration_id = m.id"
					 "   ORDER BY l.id DESC LIMIT 1), true)"
					 " ORDER BY s.migration_id", 0, NULL, NULL, NULL);
	ids = palloc(sizeof(int64) * (SPI_processed + 1));
	roles = palloc(sizeof(Oid) * (SPI_processed + 1));
	n = 0;
	for (uint64 i = 0; i < SPI_processed; i++)
		if (rm_steer_has_next_step(rm_result_text(i, 3), (int) rm_result_int64(i, 4),
								   DatumGetBool(rm_result_datum(i, 5))))
		{
			ids[n] = rm_result_int64(i, 1);
			roles[n++] = (Oid) rm_result_int64(i, 2);
		}

	for (int i = 0; i < n; i++)
	{
		if (rm_runner_pid(RM_RUNNER_MIGRATION, ids[i]) != 0 || !may_launch(ids[i]))
			continue;
		/* it waits for our commit, or the next scout would count it again */
		if (!rm_steer_launch(ids[i], roles[i], GetTopTransactionId(), NULL))
		{
			ereport(LOG,
					(errcode(ERRCODE_INSUFFICIENT_RESOURCES),
					 errmsg("no background worker is free to go on with migration %lld",
							(long long) ids[i]),
					 errdetail("max_worker_processes allows %d background workers, and all are in use.",
							   max_worker_processes),
					 errhint("It is tried again; or increase max_worker_processes.")));
			break;
		}
		ereport(LOG,
				(errmsg("migration %lld was interrupted and goes on", (long long) ids[i])));
	}
}

/* Entry point of a scout; its argument is the database. */
void
rm_scout_main(Datum main_arg)
{
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnectionByOid(DatumGetObjectId(main_arg), InvalidOid, 0);

	StartTransactionCommand();
	XactReadOnly = false;
	(void) set_config_option("lock_timeout", "1000", PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
	if (extension_is_here())
	{
		SPI_connect();
		PushActiveSnapshot(GetTransactionSnapshot());
		launch_runners();
		PopActiveSnapshot();
		SPI_finish();
	}
	CommitTransactionCommand();
}
