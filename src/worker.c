/*-------------------------------------------------------------------------
 *
 * worker.c
 *	  Statements that must be top-level, run in a background worker.
 *
 * VACUUM and CREATE INDEX CONCURRENTLY commit in their middle, so PostgreSQL
 * refuses them inside a procedure.  Here a session (the starter) has such a
 * statement run by a dynamic background worker and waits for its end:
 *
 *	  starter									worker
 *	  statement, roles and settings
 *	  into a DSM segment, register  ------->	attach, connect as the
 *	  wait on the latch							session's user, become the
 *												current role, settings
 *												run the statement
 *	  raise what the worker reported  <-------	result into the segment, exit
 *
 * The segment needs no lock: the starter writes before the worker exists, the
 * worker writes alone, and the starter reads when the worker is gone.
 *
 * The worker notes the locks that its statement holds (rm_lock_watch()), and
 * leaves the notes behind however it ends.  What cannot be noted there is how
 * long CREATE INDEX CONCURRENTLY waits for the transactions of others, since that
 * is over before its next commit.  The starter looks at it from time to time: a
 * process tells everybody when it began to wait.
 *
 * Easy to get wrong:
 *
 * - A snapshot of the starter.  CREATE INDEX CONCURRENTLY waits for all older
 *	 ones; the starter waits for the worker on a latch, which the deadlock
 *	 detector does not see.  Hence the check at the start, and the catalog
 *	 snapshot, which any look into a catalog leaves behind, is dropped again
 *	 before each wait.
 *
 * - Roles.  The worker connects as the session's user, never as a superuser
 *	 with a role set: RESET ROLE and RESET SESSION AUTHORIZATION lead back to
 *	 what the session could do anyway.
 *
 * - Settings.  RestoreGUCState() is made for parallel workers.  It resets
 *	 everything to the built-in defaults and then sets also role,
 *	 session_authorization and the properties of the current transaction, which
 *	 works only where InitializingParallelWorker switches their checks off.
 *	 So the starter sends what its session has on top of the configuration
 *	 file, without those.  statement_timeout works all the same: it counts in
 *	 the starter, and cancelling the starter cancels the worker.
 *
 * - What does not come as an error.  VACUUM of somebody else's table only
 *	 warns, and a refused connection is a FATAL message in the server's log.
 *	 A log hook picks both up in the worker.  That is an addition to make
 *	 messages better, nothing depends on it, for log_min_messages decides
 *	 what the hook gets to see.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <signal.h>

#include "access/xact.h"
#include "compat.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "nodes/pg_list.h"
#include "parser/analyze.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/dsm.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/proc.h"
#include "storage/procarray.h"
#include "tcop/dest.h"
#include "tcop/tcopprot.h"
#include "tcop/utility.h"
#include "utils/guc.h"
#include "utils/guc_tables.h"
#include "utils/memutils.h"
#include "utils/portal.h"
#include "utils/resowner.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "worker.h"

#define SEGMENT_MAGIC 0x726d7731
#define MAX_WARNINGS 4

/* how long a cancelled starter waits for its worker, milliseconds */
#define CANCEL_PATIENCE 1000
#define TERMINATE_PATIENCE 9000

/*
 * How often a starter looks what its worker waits for, milliseconds; in between,
 * at each hundredth of the time that has gone by.
 */
#define FIRST_LOOK 10
#define LAST_LOOK 100

/* room for notes on locks: of the statement, and of each table in the tree */
#define LOCK_NOTES 32
#define LOCK_NOTES_PER_TABLE 16

/* What starter and worker share. */
typedef struct Segment
{
	uint32		magic;

	/* the order, written by the starter */
	Oid			database;
	Oid			session_user;
	Oid			role;
	int			nsettings;
	Size		settings;		/* where in text: name=value, one after the other */
	Size		locks;			/* from the segment's beginning: RmLockNotes */

	/* the result, written by the worker */
	bool		attached;
	bool		done;
	bool		failed;
	RmReport		error;			/* valid if failed */
	int			nwarnings;
	RmReport		warnings[MAX_WARNINGS];

	char		text[FLEXIBLE_ARRAY_MEMBER];	/* the statement, settings, locks */
} Segment;

/* What the starter must clean up, and what it keeps an eye on. */
typedef struct Run
{
	dsm_segment *dsm;
	BackgroundWorkerHandle *handle;
	RmLockAccount *account;		/* where the worker's locks go, or NULL */
	PGPROC	   *proc;			/* the worker, once it was seen */
	TimestampTz began;
	TimestampTz waits_since;	/* for a transaction of others, or 0 */
	double		waited_ms;		/* altogether */
} Run;

PGDLLEXPORT void rm_worker_main(Datum main_arg);

/* in the worker: the segment, and the hook that was there before ours */
static Segment *segment = NULL;
static emit_log_hook_type previous_log_hook = NULL;

/*
 * Settings that belong to a session or transaction itself; the worker has its
 * own.  Names as in guc_tables.c.
 */
static const char *const not_carried_over[] = {
	"client_encoding",
	"role",
	"seed",
	"session_authorization",
	"transaction_deferrable",
	"transaction_isolation",
	"transaction_read_only",
};

/* Copies text (or NULL) into a field, cut at a character's boundary. */
static void
copy_field(char *field, Size size, const char *text)
{
	int			len = text ? strlen(text) : 0;

	if (len >= size)
		len = pg_mbcliplen(text, len, size - 1);
	if (len > 0)
		memcpy(field, text, len);
	field[len] = '\0';
}

void
rm_report_copy(RmReport *report, const ErrorData *edata)
{
	report->sqlerrcode = edata->sqlerrcode;
	copy_field(report->message, sizeof(report->message), edata->message);
	copy_field(report->detail, sizeof(report->detail), edata->detail);
	copy_field(report->hint, sizeof(report->hint), edata->hint);
	copy_field(report->context, sizeof(report->context), edata->context);
}

/* Says again, in the starter, what was said in the worker. */
void
rm_report_repeat(int elevel, const RmReport *report, const char *what)
{
	ereport(elevel,
			(errcode(report->sqlerrcode),
			 errmsg_internal("%s", report->message),
			 report->detail[0] ? errdetail_internal("%s", report->detail) : 0,
			 report->hint[0] ? errhint("%s", report->hint) : 0,
			 report->context[0] ? errcontext("%s", report->context) : 0,
			 errcontext("background worker for %s", what)));
}

/* ------------------------------------------------------------------------
 * The starter
 * ------------------------------------------------------------------------
 */

/*
 * Raises an error if this backend holds a snapshot: a statement that waits for
 * all snapshots would wait for ours, and we for it.  Drops the catalog
 * snapshot, which is nobody's and would count too.
 */
static void
require_no_snapshot(const char *what)
{
	InvalidateCatalogSnapshot();
	if (ActiveSnapshotSet() || TransactionIdIsValid(MyProc->xmin))
		ereport(ERROR,
				(errcode(ERRCODE_ACTIVE_SQL_TRANSACTION),
				 errmsg("cannot wait for %s while holding a snapshot", what),
				 errdetail("The statement would wait for the snapshot, and its holder for the statement."),
				 errhint("Commit before the statement, in a READ COMMITTED transaction of a procedure that was called at top level.")));
}

/*
 * The settings that this session has on top of the configuration file (from
 * its database, its role, its client or SET), as a list of name=value.
 */
List *
rm_session_settings(void)
{
	int			nvariables;
	struct config_generic **variables = rm_guc_variables(&nvariables);
	List	   *settings = NIL;

	for (int i = 0; i < nvariables; i++)
	{
		struct config_generic *variable = variables[i];
		const char *value;
		bool		carried_over = true;

		if (variable->source < PGC_S_GLOBAL ||
			(variable->context != PGC_USERSET && variable->context != PGC_SUSET))
			continue;
		for (int j = 0; j < lengthof(not_carried_over); j++)
			if (strcmp(variable->name, not_carried_over[j]) == 0)
				carried_over = false;
		if (!carried_over)
			continue;
		value = GetConfigOption(variable->name, true, false);
		if (value == NULL)
			continue;

		settings = lappend(settings, psprintf("%s=%s", variable->name, value));
	}
	return settings;
}

static RmLockNotes *
lock_notes(dsm_segment *dsm)
{
	Segment    *order = dsm_segment_address(dsm);

	return (RmLockNotes *) ((char *) order + order->locks);
}

/* Writes the order into a new segment, which lives as the resource owner. */
static dsm_segment *
create_segment(const char *sql, const RmWorkerLocks *known)
{
	StringInfoData text;
	Size		offset;
	List	   *settings = rm_session_settings();
	ListCell   *lc;
	dsm_segment *dsm;
	Segment    *order;
	RmLockNotes *notes;
	Size		locks;
	int			size = known ? LOCK_NOTES + LOCK_NOTES_PER_TABLE * known->tables : 0;

	initStringInfo(&text);
	appendBinaryStringInfo(&text, sql, strlen(sql) + 1);
	offset = text.len;
	foreach(lc, settings)
		appendBinaryStringInfo(&text, lfirst(lc), strlen(lfirst(lc)) + 1);

	locks = MAXALIGN(offsetof(Segment, text) + text.len);
	dsm = dsm_create(locks + offsetof(RmLockNotes, notes) + size * sizeof(RmLockNote), 0);
	order = dsm_segment_address(dsm);
	memset(order, 0, offsetof(Segment, text));
	order->magic = SEGMENT_MAGIC;
	order->database = MyDatabaseId;
	order->session_user = GetSessionUserId();
	order->role = GetUserId();
	order->nsettings = list_length(settings);
	order->settings = offset;
	order->locks = locks;
	memcpy(order->text, text.data, text.len);
	notes = lock_notes(dsm);
	memset(notes, 0, offsetof(RmLockNotes, notes));
	notes->relid = known ? known->relid : InvalidOid;
	notes->target = known ? known->target : InvalidOid;
	notes->size = size;
	pfree(text.data);
	list_free_deep(settings);
	return dsm;
}

/*
 * Asks for a dynamic background worker of this library, which runs function
 * (exported, of one Datum) with arg and a copy of extra, and tells us of its
 * beginning and end if notify.  what says in messages what it is for.  If all
 * max_worker_processes are in use: 53000, or NULL without a what.
 */
BackgroundWorkerHandle *
rm_worker_register(const char *name, const char *type, const char *function,
				   Datum arg, const void *extra, Size extra_size, bool notify,
				   const char *what)
{
	BackgroundWorker worker;
	BackgroundWorkerHandle *handle;

	memset(&worker, 0, sizeof(worker));
	copy_field(worker.bgw_name, sizeof(worker.bgw_name), name);
	strlcpy(worker.bgw_type, type, BGW_MAXLEN);
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS |
		BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = BGW_NEVER_RESTART;
	strlcpy(worker.bgw_library_name, "risky_migrations",
			sizeof(worker.bgw_library_name));
	strlcpy(worker.bgw_function_name, function, BGW_MAXLEN);
	worker.bgw_main_arg = arg;
	Assert(extra_size <= BGW_EXTRALEN);
	if (extra_size > 0)
		memcpy(worker.bgw_extra, extra, extra_size);
	if (notify)
		worker.bgw_notify_pid = MyProcPid;

	if (RegisterDynamicBackgroundWorker(&worker, &handle))
		return handle;
	if (what)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_RESOURCES),
				 errmsg("no background worker is free for %s", what),
				 errdetail("max_worker_processes allows %d background workers, and all are in use.",
						   max_worker_processes),
				 errhint("Increase max_worker_processes (needs a restart), or try again when other background workers have ended.")));
	return NULL;
}

/* A wait of the worker's, if there was one, has ended by now. */
static void
add_wait(Run *run)
{
	if (run->waits_since != 0)
		run->waited_ms += (GetCurrentTimestamp() - run->waits_since) / 1000.0;
	run->waits_since = 0;
}

/*
 * Is the worker waiting for somebody's transaction, and since when?  Both words
 * are single ones, which it sets without a lock; they may belong to two waits,
 * and then the next look sees that.  Returns when to look again, milliseconds.
 */
static long
look_at_waits(Run *run, pid_t pid)
{
	uint32		event;
	TimestampTz since = 0;

	if (run->proc == NULL)
		run->proc = BackendPidGetProc(pid);
	if (run->proc && run->proc->pid == pid)
	{
		event = *(volatile uint32 *) &run->proc->wait_event_info;
		if (event == (PG_WAIT_LOCK | LOCKTAG_VIRTUALTRANSACTION) ||
			event == (PG_WAIT_LOCK | LOCKTAG_TRANSACTION))
			since = (TimestampTz) pg_atomic_read_u64(&run->proc->waitStart);
	}
	if (since != run->waits_since)
		add_wait(run);
	run->waits_since = since;
	return Min(LAST_LOOK,
			   Max(FIRST_LOOK,
				   TimestampDifferenceMilliseconds(run->began, GetCurrentTimestamp()) / 100));
}

/*
 * Waits for the worker's end, but not longer than patience (milliseconds; -1:
 * as long as it takes, and only then interruptible).  Returns whether it ended.
 */
static bool
wait_for_end(Run *run, long patience)
{
	TimestampTz deadline = TimestampTzPlusMilliseconds(GetCurrentTimestamp(),
													   patience);
	pid_t		pid;

	for (;;)
	{
		BgwHandleStatus status;
		long		timeout = -1;

		if (patience < 0)
		{
			CHECK_FOR_INTERRUPTS();
			InvalidateCatalogSnapshot();
		}
		status = GetBackgroundWorkerPid(run->handle, &pid);
		if (status == BGWH_STOPPED)
			return true;
		if (patience >= 0)
		{
			timeout = TimestampDifferenceMilliseconds(GetCurrentTimestamp(),
													  deadline);
			if (timeout <= 0)
				return false;
		}
		else if (run->account && status == BGWH_STARTED)
			timeout = look_at_waits(run, pid);
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_EXIT_ON_PM_DEATH |
						 (timeout >= 0 ? WL_TIMEOUT : 0),
						 timeout, WAIT_EVENT_BGWORKER_SHUTDOWN);
		ResetLatch(MyLatch);
	}
}

/* The worker is gone: what it has held and waited for goes into the account. */
static void
take_locks(Run *run)
{
	if (run->account == NULL)
		return;
	rm_lock_notes_add(run->account, lock_notes(run->dsm));
	add_wait(run);
	if (run->waited_ms > 0)
		rm_lock_note_wait(run->account, run->waited_ms);
}

/*
 * The starter fails (code 0) or exits: takes the worker along.  When it fails
 * it waits until the statement is undone, so that whoever handles the error
 * finds no locks of the worker's.  A cancelled worker ends like any cancelled
 * statement; if it does not heed that, it is terminated.
 */
static void
stop_worker(int code, Datum arg)
{
	Run		   *run = (Run *) DatumGetPointer(arg);
	pid_t		pid;

	if (code == 0 &&
		GetBackgroundWorkerPid(run->handle, &pid) == BGWH_STARTED)
	{
		kill(pid, SIGINT);
		(void) wait_for_end(run, CANCEL_PATIENCE);
	}
	TerminateBackgroundWorker(run->handle);
	if (code == 0)
	{
		if (wait_for_end(run, TERMINATE_PATIENCE))
			take_locks(run);
		else
			ereport(WARNING,
					(errcode(ERRCODE_QUERY_CANCELED),
					 errmsg("the background worker did not end within %d s of being terminated",
							(CANCEL_PATIENCE + TERMINATE_PATIENCE) / 1000)));
		dsm_detach(run->dsm);

		/* the waits may have swallowed a wake-up that was meant for others */
		SetLatch(MyLatch);
	}
}

/* Raises what the worker reported; its worker is gone. */
static void
raise_result(const Segment *result, const char *what)
{
	for (int i = 0; i < result->nwarnings; i++)
		rm_report_repeat(WARNING, &result->warnings[i], what);

	if (result->done)
		return;

	if (!result->attached)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_RESOURCES),
				 errmsg("the background worker for %s could not be started", what),
				 errdetail("It ended before it had begun its work."),
				 errhint("Look for the reason in the server's log.")));

	if (result->failed && result->error.sqlerrcode != ERRCODE_ADMIN_SHUTDOWN)
		rm_report_repeat(ERROR, &result->error, what);

	ereport(ERROR,
			(errcode(ERRCODE_ADMIN_SHUTDOWN),
			 errmsg("the background worker for %s was terminated", what),
			 result->failed ? errdetail_internal("%s", result->error.message) : 0,
			 errhint("Look for what the interrupted statement left behind, such as an invalid index, before you run it again.")));
}

void
rm_worker_run(const char *sql, const char *what, const RmWorkerLocks *locks)
{
	Run			run = {.account = locks ? locks->account : NULL,
	.began = GetCurrentTimestamp()};
	Segment    *result;

	Assert(IsTransactionState());
	if (!rm_worker_can_be(GetSessionUserId()))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("a background worker for %s cannot connect as role \"%s\"",
						what, GetUserNameFromId(GetSessionUserId(), false)),
				 errdetail("Before PostgreSQL 17 it needs the attribute LOGIN."),
				 errhint("Connect as a role that may log in, then SET ROLE.")));
	require_no_snapshot(what);

	run.dsm = create_segment(sql, locks);
	run.handle = rm_worker_register(psprintf("risky_migrations worker for %s", what),
									"risky_migrations worker", "rm_worker_main",
									UInt32GetDatum(dsm_segment_handle(run.dsm)),
									NULL, 0, true, what);
	PG_ENSURE_ERROR_CLEANUP(stop_worker, PointerGetDatum(&run));
	{
		(void) wait_for_end(&run, -1);
	}
	PG_END_ENSURE_ERROR_CLEANUP(stop_worker, PointerGetDatum(&run));
	take_locks(&run);

	/* a copy: raising an error leaves no chance to detach */
	result = palloc(offsetof(Segment, text));
	memcpy(result, dsm_segment_address(run.dsm), offsetof(Segment, text));
	dsm_detach(run.dsm);
	pfree(run.handle);
	raise_result(result, what);
	pfree(result);
}

/* ------------------------------------------------------------------------
 * The worker
 * ------------------------------------------------------------------------
 */

/*
 * Log hook: hands on what is not raised as an error of the statement, warnings
 * and the worker's own death.  Warnings are kept out of the log here, for the
 * starter will log them.
 */
static void
pick_up_report(ErrorData *edata)
{
	if (edata->elevel >= ERROR && !segment->failed)
	{
		rm_report_copy(&segment->error, edata);
		segment->failed = true;
	}
	else if (edata->elevel == WARNING && segment->nwarnings < MAX_WARNINGS)
	{
		rm_report_copy(&segment->warnings[segment->nwarnings++], edata);
		edata->output_to_server = false;
	}
	if (previous_log_hook)
		previous_log_hook(edata);
}

/* This process ends, and has let go of its locks. */
static void
leave_notes(dsm_segment *dsm, Datum arg)
{
	rm_lock_watch_end();
}

/*
 * Attaches to the starter's segment for as long as this process lives, and
 * begins to report into it.  False if the starter has gone meanwhile.
 */
static bool
attach_segment(dsm_handle handle)
{
	dsm_segment *dsm;

	CurrentResourceOwner = ResourceOwnerCreate(NULL, "risky_migrations worker");
	dsm = dsm_attach(handle);
	if (dsm == NULL)
		return false;
	dsm_pin_mapping(dsm);
	segment = dsm_segment_address(dsm);
	if (segment->magic != SEGMENT_MAGIC)
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR),
				 errmsg("shared memory segment of a risky_migrations worker has another format"),
				 errdetail("The library was replaced while the session was connected."),
				 errhint("Reconnect: the session uses an older version of the library.")));
	on_dsm_detach(dsm, leave_notes, (Datum) 0);
	segment->attached = true;
	previous_log_hook = emit_log_hook;
	emit_log_hook = pick_up_report;
	return true;
}

/*
 * In a worker: becomes role, with those settings (name=value), in a transaction
 * of its own.  The settings are set with the rights of a superuser: the
 * starter's session had them in force, so whether they may be set was decided
 * there.  elevel is for a setting that cannot be set (any more).
 */
void
rm_worker_become(Oid role, List *settings, int elevel)
{
	ListCell   *lc;

	StartTransactionCommand();
	foreach(lc, settings)
	{
		char	   *name = pstrdup(lfirst(lc));
		char	   *value = strchr(name, '=');

		if (value == NULL)
			continue;
		*value++ = '\0';
		(void) set_config_option(name, value, PGC_SUSET, PGC_S_SESSION,
								 GUC_ACTION_SET, true, elevel, false);
	}

	/* what our work needs, whatever the session's default */
	SetConfigOption("default_transaction_isolation", "read committed",
					PGC_USERSET, PGC_S_SESSION);
	SetConfigOption("default_transaction_read_only", "off",
					PGC_USERSET, PGC_S_SESSION);
	SetConfigOption("default_transaction_deferrable", "off",
					PGC_USERSET, PGC_S_SESSION);

	if (role == GetSessionUserId())
		SetCurrentRoleId(InvalidOid, false);
	else
		SetCurrentRoleId(role, superuser_arg(role));
	CommitTransactionCommand();
}

/* the starter's settings, from the segment */
static List *
settings_of_starter(void)
{
	const char *next = segment->text + segment->settings;
	List	   *settings = NIL;

	for (int i = 0; i < segment->nsettings; i++)
	{
		settings = lappend(settings, unconstify(char *, next));
		next += strlen(next) + 1;
	}
	return settings;
}

/*
 * Parses, analyzes and plans the one statement into the current memory
 * context.
 */
static List *
plan_statement(const char *sql, CommandTag *tag)
{
	List	   *parsetrees = pg_parse_query(sql);
	RawStmt    *parsetree;
	List	   *querytrees;
	List	   *plans;
	bool		snapshot_set = false;

	if (list_length(parsetrees) != 1)
		ereport(ERROR,
				(errcode(ERRCODE_SYNTAX_ERROR),
				 errmsg("a background worker runs exactly one statement"),
				 errdetail("It was given %d.", list_length(parsetrees)),
				 errhint("Give it one statement at a time.")));
	parsetree = linitial_node(RawStmt, parsetrees);
	*tag = CreateCommandTag(parsetree->stmt);

	if (analyze_requires_snapshot(parsetree))
	{
		PushActiveSnapshot(GetTransactionSnapshot());
		snapshot_set = true;
	}
	querytrees = pg_analyze_and_rewrite_fixedparams(parsetree, sql,
													NULL, 0, NULL);
	plans = pg_plan_queries(querytrees, sql, CURSOR_OPT_PARALLEL_OK, NULL);
	if (snapshot_set)
		PopActiveSnapshot();
	return plans;
}

/*
 * In a worker: runs the statement as a client's simple query would be run,
 * outside any transaction block, at top level.  Rows that it returns are thrown
 * away.
 */
void
rm_worker_statement(const char *sql)
{
	MemoryContext context;
	MemoryContext transaction_context;
	CommandTag	tag;
	List	   *plans;
	Portal		portal;

	debug_query_string = sql;
	pgstat_report_activity(STATE_RUNNING, sql);
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();

	/* the plan must outlive the transactions that the statement goes through */
	context = AllocSetContextCreate(TopMemoryContext, "risky_migrations statement",
									ALLOCSET_DEFAULT_SIZES);
	transaction_context = MemoryContextSwitchTo(context);
	plans = plan_statement(sql, &tag);
	MemoryContextSwitchTo(transaction_context);

	CHECK_FOR_INTERRUPTS();
	portal = CreatePortal("", true, true);
	portal->visible = false;
	PortalDefineQuery(portal, NULL, sql, tag, plans, NULL);
	PortalStart(portal, NULL, 0, InvalidSnapshot);
	rm_portal_run(portal, true, None_Receiver);
	PortalDrop(portal, false);
	CommitTransactionCommand();

	pgstat_report_stat(true);
	pgstat_report_activity(STATE_IDLE, NULL);
	debug_query_string = NULL;
	MemoryContextDelete(context);
}

/* Entry point of the worker; its argument is the segment's handle. */
void
rm_worker_main(Datum main_arg)
{
	MemoryContext context = CurrentMemoryContext;

	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();

	if (!attach_segment(DatumGetUInt32(main_arg)))
		return;
	BackgroundWorkerInitializeConnectionByOid(segment->database,
											  segment->session_user,
											  RM_WORKER_CONNECT_FLAGS);

	PG_TRY();
	{
		const char *sql = MemoryContextStrdup(TopMemoryContext, segment->text);
		RmLockNotes *notes = (RmLockNotes *) ((char *) segment + segment->locks);

		rm_worker_become(segment->role, settings_of_starter(), ERROR);
		/* as in rm_execute() */
		SetConfigOption("default_tablespace", "", PGC_USERSET, PGC_S_SESSION);
		pgstat_report_activity(STATE_RUNNING, sql);
		if (notes->size > 0)
			rm_lock_watch(notes);
		rm_worker_statement(sql);
		rm_lock_watch_end();
		segment->done = true;
	}
	PG_CATCH();
	{
		/* not logged here: the starter raises it, and logs it then */
		ErrorData  *edata;

		MemoryContextSwitchTo(context);
		edata = CopyErrorData();
		FlushErrorState();
		rm_report_copy(&segment->error, edata);
		segment->failed = true;
		debug_query_string = NULL;
		AbortCurrentTransaction();
		rm_lock_watch_end();
	}
	PG_END_TRY();
}
